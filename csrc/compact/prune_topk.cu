// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: scores once, kept rows twice (read, write), 8 bytes of index each. Short rows (an image's tokens) are selected
// by one block each in about 2 us of latency; blocks that share a row repeat that instead of waiting for each other,
// and each copies its part of the kept rows: one launch. Longer rows are selected first (common/topk_rows.cu) and
// copied by a last launch.
#include "common/copy_rows.cuh"
#include "common/launch.cuh"
#include "common/topk_rows.cuh"
#include "compact/prune_topk.h"

namespace tokred {
namespace {

struct SelectStorage {
  BlockTopkScratch topk;
};

// grid: batch_size * splits. The tail of the shared memory holds the row's list, k int32.
template <typename T, int kItems>
__global__ void __launch_bounds__(1024) prune_topk_fused_kernel(const PruneTopkArgs args, int splits) {
  TOKRED_SHARED(SelectStorage, shared);
  TOKRED_SHARED_TAIL(SelectStorage, tail);
  int* kept = reinterpret_cast<int*>(tail);
  const int64_t batch_idx = blockIdx.x / splits;
  const int split = static_cast<int>(blockIdx.x % splits);
  const int k = static_cast<int>(args.rows.k);
  BlockTeam team(shared.topk);
  const int count = select_row<T, kItems>(args.rows, batch_idx, team, [&](int slot, int token) { kept[slot] = token; });
  for (int slot = count + static_cast<int>(threadIdx.x); slot < k; slot += static_cast<int>(blockDim.x))
    kept[slot] = -1;
  __syncthreads();  // the list is whole
  if (split == 0) {
    for (int slot = static_cast<int>(threadIdx.x); slot < k; slot += static_cast<int>(blockDim.x)) {
      args.rows.kept_idx[batch_idx * k + slot] = kept[slot];
    }
    if (args.rows.num_kept && threadIdx.x == 0) args.rows.num_kept[batch_idx] = count;
  }
  const int64_t begin = topk_span(args.rows, batch_idx).begin;
  for (int t = 0; t < args.num_tensors; ++t) {
    const RowTensor& tensor = args.tensors[t];
    const int width = copy_width(tensor);
    const int64_t units = k * (tensor.row_bytes / width), share = ceil_div<int64_t>(units, splits);
    const int64_t first = split * share, last = first + share < units ? first + share : units;
    copy_range(tensor, width, k, batch_idx * units + first, batch_idx * units + last,
               [&](int64_t, int64_t, int64_t slot) -> int64_t { return kept[slot] < 0 ? -1 : begin + kept[slot]; });
  }
}

__global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerSm)
    prune_topk_copy_kernel(const PruneTopkArgs args, const CopyPlan<kPruneTopkMaxTensors> plan) {
  copy_chunk(plan, args.tensors, args.rows.num_rows, args.rows.k, blockIdx.x,
             [&](int, int64_t batch, int64_t, int64_t slot) -> int64_t {
               const int64_t token = args.rows.kept_idx[batch * args.rows.k + slot];
               return token < 0 ? -1 : token + topk_span(args.rows, batch).begin;
             });
}

template <typename T>
int select_and_copy(const PruneTopkArgs& args, const PruneTopkPolicy& policy, CUstream_st* stream) {
  const int splits = static_cast<int>(prune_topk_splits(args.rows.num_rows, args.rows.k, args.tensors[0].row_bytes));
  const size_t shared_bytes = shared_bytes_with_tail<SelectStorage>(static_cast<size_t>(args.rows.k) * sizeof(int));
  int error = cudaErrorInvalidValue;
  const bool known = dispatch_int<1, 2, 4>(policy.items, [&](auto items) {
    error = launch(prune_topk_fused_kernel<T, decltype(items)::value>,
                   dim3(static_cast<unsigned>(args.rows.num_rows * splits)), dim3(policy.threads), shared_bytes, stream,
                   args, splits);
  });
  return known ? error : static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace

int prune_topk_cuda(const PruneTopkArgs& args, CUstream_st* stream) {
  const TopkRows& rows = args.rows;
  if (rows.num_rows == 0) return cudaSuccess;
  const PruneTopkPolicy policy = choose_policy(rows.max_seqlen, rows.k);
  int error = cudaErrorInvalidValue;
  if (policy.fused) {
    dispatch_float(rows.dtype,
                   [&](auto tag) { error = select_and_copy<typename decltype(tag)::type>(args, policy, stream); });
    return error;
  }
  error = topk_rows_cuda(rows, policy.select, stream);
  if (error != cudaSuccess || rows.k == 0) return error;
  const auto plan = plan_copy<kPruneTopkMaxTensors>(args.tensors, args.num_tensors, rows.num_rows, rows.k);
  if (!plan.fits) return cudaErrorInvalidValue;
  return launch(prune_topk_copy_kernel, dim3(static_cast<unsigned>(plan.first_chunk[plan.num_tensors])),
                dim3(kCopyThreads), 0, stream, args, plan);
}

}  // namespace tokred
