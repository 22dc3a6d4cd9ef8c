// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: each row that is kept read once, of the base the rows that are not (all of them when blended), each output row
// written once, and the lists. Written from the side of the output, so that no row is written twice and repeated ids
// have an order: a first, small launch turns the lists around, the largest slot of a token wins; the second moves rows
// of all tensors.
#include "common/copy_rows.cuh"
#include "common/launch.cuh"
#include "compact/scatter_tokens.h"

namespace tokred {
namespace {

constexpr int kSlotTokens = 4096, kSlotThreads = 256;  // tokens of a list that one block looks for

struct SlotStorage {
  int slot[kSlotTokens];
};

// grid: lists * chunks. A block reads the whole list, which L2 holds, for its part of the tokens.
__global__ void __launch_bounds__(kSlotThreads) scatter_slots_kernel(const ScatterTokensArgs args, int chunks) {
  TOKRED_SHARED(SlotStorage, shared);
  const int64_t list = blockIdx.x / chunks, first = int64_t{blockIdx.x % chunks} * kSlotTokens;
  const int64_t left = args.num_tokens - first;
  const int count = static_cast<int>(left < kSlotTokens ? left : kSlotTokens);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSlotThreads) shared.slot[i] = -1;
  __syncthreads();  // empty
  for (int64_t slot = threadIdx.x; slot < args.k; slot += kSlotThreads) {
    const int64_t at = args.kept_idx[list * args.k + slot] - first;
    if (at >= 0 && at < count) atomicMax(&shared.slot[at], static_cast<int>(slot));
  }
  __syncthreads();  // all slots were offered
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSlotThreads) {
    args.slot_idx[list * args.num_tokens + first + i] = shared.slot[i];
  }
}

// Rows as they are: a kept one, else the base's.
struct ScatteredRows {
  const ScatterTokensArgs& args;
  const ScatterTensor& t;

  struct Row {
    const char* from;
  };
  __device__ Row find(int64_t batch, int64_t head, int64_t token, int64_t byte, bool inside) const {
    const int64_t slot = scatter_slot(args, inside ? batch : 0, inside ? head : 0, inside ? token : 0);
    const char* row = slot >= 0 ? scatter_row(t, batch, head, slot) : scatter_base(t, batch, head, token);
    return {inside && row ? row + byte : nullptr};
  }
  template <int kBytes>
  __device__ typename detail::Word<kBytes>::type load(const Row& row) const {
    using Word = typename detail::Word<kBytes>::type;
    return row.from ? *reinterpret_cast<const Word*>(row.from) : Word{};  // no __ldg: the base may be the output
  }
};

template <typename T>
struct BlendedRows {
  const ScatterTokensArgs& args;
  const ScatterTensor& t;

  struct Row {
    const char *fresh, *base;  // null: none
  };
  __device__ Row find(int64_t batch, int64_t head, int64_t token, int64_t byte, bool inside) const {
    const int64_t slot = scatter_slot(args, inside ? batch : 0, inside ? head : 0, inside ? token : 0);
    const char* base = scatter_base(t, batch, head, token);
    const bool listed = inside && slot >= 0, based = inside && base && (slot < 0 || args.beta != 0);
    return {listed ? scatter_row(t, batch, head, slot) + byte : nullptr, based ? base + byte : nullptr};
  }
  template <int kBytes>
  __device__ typename detail::Word<kBytes>::type load(const Row& row) const {
    using Word = typename detail::Word<kBytes>::type;
    const Word fresh = row.fresh ? __ldg(reinterpret_cast<const Word*>(row.fresh)) : Word{};
    const Word base = row.base ? *reinterpret_cast<const Word*>(row.base) : Word{};
    if constexpr (kBytes >= sizeof(T)) {
      constexpr int kValues = kBytes / sizeof(T);
      auto out = detail::bits_as<Pack<T, kValues>>(base);
      const auto kept = detail::bits_as<Pack<T, kValues>>(fresh);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const float value = args.alpha * static_cast<float>(kept.v[i]) + args.beta * static_cast<float>(out.v[i]);
        if (row.fresh) out.v[i] = static_cast<T>(value);
      }
      return detail::bits_as<Word>(out);
    }
    return base;  // no tensor of T is moved in parts of a value
  }
};

__global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerSm)
    scatter_tokens_kernel(const ScatterTokensArgs args, const CopyPlan<kScatterMaxTensors> plan) {
  visit_chunk(plan, args.tensors, args.batch_size, args.num_tokens, blockIdx.x,
              [&](int i, int width, int64_t first, int64_t last) {
                const ScatterTensor& t = args.tensors[i];
                copy_rows_range(t, width, args.num_tokens, first, last, ScatteredRows{args, t});
              });
}

// Two loads in flight per unit: three blocks on an SM have more bytes on their way than four that copy.
__global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerSm - 1)
    scatter_blend_kernel(const ScatterTokensArgs args, const CopyPlan<kScatterMaxTensors> plan) {
  visit_chunk(plan, args.tensors, args.batch_size, args.num_tokens, blockIdx.x,
              [&](int i, int width, int64_t first, int64_t last) {
                const ScatterTensor& t = args.tensors[i];
                switch (t.dtype) {
                  case DType::kF32:
                    return copy_rows_range(t, width, args.num_tokens, first, last, BlendedRows<float>{args, t});
                  case DType::kF16:
                    return copy_rows_range(t, width, args.num_tokens, first, last, BlendedRows<c10::Half>{args, t});
                  case DType::kBF16:
                    return copy_rows_range(t, width, args.num_tokens, first, last, BlendedRows<c10::BFloat16>{args, t});
                }
              });
}

}  // namespace

int scatter_tokens_cuda(const ScatterTokensArgs& args, CUstream_st* stream) {
  const auto plan = plan_copy<kScatterMaxTensors>(args.tensors, args.num_tensors, args.batch_size, args.num_tokens);
  const int64_t chunks = ceil_div<int64_t>(args.num_tokens, kSlotTokens);
  const int64_t blocks = args.batch_size * args.list_heads * chunks;
  if (!plan.fits || blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (!args.slots_known) {
    const int error = launch(scatter_slots_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kSlotThreads),
                             sizeof(SlotStorage), stream, args, static_cast<int>(chunks));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(plan.first_chunk[plan.num_tensors]));
  return args.blend ? launch(scatter_blend_kernel, grid, dim3(kCopyThreads), 0, stream, args, plan)
                    : launch(scatter_tokens_kernel, grid, dim3(kCopyThreads), 0, stream, args, plan);
}

}  // namespace tokred
