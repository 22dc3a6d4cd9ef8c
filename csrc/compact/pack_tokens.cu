// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: the mask, kept rows twice (read, write), zeros for the rest of the capacity. A block counts what its part of
// the mask keeps; from all counts each knows where its part starts and writes its rows' numbers, while further blocks
// look up the bounds of the sequences; the last launch copies. No block waits for another one. A mask of one tile needs
// no counting.
#include "common/block.cuh"
#include "common/copy_rows.cuh"
#include "common/launch.cuh"
#include "compact/pack_tokens.h"

namespace tokred {
namespace {

struct PackStorage {
  BlockScratch block;
};

__device__ inline int64_t chunk_end(const PackTokensArgs& args, const PackChunks& chunks, int64_t first) {
  return first + chunks.tokens < args.total_tokens ? first + chunks.tokens : args.total_tokens;
}

// The tokens of a thread in a tile: kPackItems neighbours, as bits.
__device__ inline unsigned tile_bits(const PackTokensArgs& args, int64_t first, int64_t end) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kPackItems; ++i) {
    if (first + i < end && args.mask[first + i]) bits |= 1u << i;
  }
  return bits;
}

// grid: chunks.
__global__ void __launch_bounds__(kPackThreads) pack_count_kernel(const PackTokensArgs args, PackChunks chunks) {
  TOKRED_SHARED(PackStorage, shared);
  const int64_t first = blockIdx.x * chunks.tokens, end = chunk_end(args, chunks, first);
  int count = 0;
  for (int64_t at = first + threadIdx.x * kPackItems; at < end; at += kPackTile) {
    count += __popc(tile_bits(args, at, end));
  }
  count = block_sum(count, shared.block);
  if (threadIdx.x == 0) args.chunk_counts[blockIdx.x] = count;
}

// Kept tokens ahead of a row. All lanes call it; valid in every one.
__device__ inline int64_t warp_kept_before(const PackTokensArgs& args, const PackChunks& chunks, int64_t row) {
  int64_t chunk = row / chunks.tokens;
  chunk = chunk < chunks.count ? chunk : chunks.count - 1;  // the end of the mask
  int count = 0;
  for (int64_t i = lane_index(); i < chunk; i += kWarpSize) count += args.chunk_counts[i];
  for (int64_t i = chunk * chunks.tokens + lane_index(); i < row; i += kWarpSize) count += args.mask[i] != 0;
  return warp_sum(count);
}

// grid: chunks, then a warp per sequence.
__global__ void __launch_bounds__(kPackThreads) pack_rows_kernel(const PackTokensArgs args, PackChunks chunks) {
  TOKRED_SHARED(PackStorage, shared);
  const int rank = static_cast<int>(threadIdx.x), chunk = static_cast<int>(blockIdx.x);
  if (chunk >= chunks.count) {
    const int64_t b = int64_t{chunk - chunks.count} * (kPackThreads / kWarpSize) + warp_index();
    if (b == 0 && lane_index() == 0) args.cu_seqlens_kept[0] = 0;
    if (b >= args.batch_size) return;  // the whole warp
    const int64_t start = warp_kept_before(args, chunks, pack_start(args, b));
    const int64_t end = warp_kept_before(args, chunks, pack_start(args, b + 1));
    if (lane_index() == 0) {
      args.cu_seqlens_kept[b + 1] = static_cast<int32_t>(end < args.max_total ? end : args.max_total);
      args.num_kept[b] = static_cast<int32_t>(end > start ? end - start : 0);
    }
    return;
  }
  const int64_t first = chunk * chunks.tokens, end = chunk_end(args, chunks, first);
  int before = 0, total = 0;
  if (chunks.count > 1) {
    for (int i = rank; i < chunks.count; i += kPackThreads) {
      const int count = args.chunk_counts[i];
      total += count;
      before += i < chunk ? count : 0;
    }
    before = block_sum(before, shared.block);
    total = block_sum(total, shared.block);
  }
  for (int64_t tile = first; tile < end; tile += kPackTile) {
    const int64_t at = tile + rank * kPackItems;
    unsigned bits = tile_bits(args, at, end);
    int of_tile;
    int slot = before + block_exclusive_scan(__popc(bits), shared.block, &of_tile);
    for (; bits && slot < args.max_total; bits &= bits - 1)
      args.kept_rows[slot++] = at + __ffs(static_cast<int>(bits)) - 1;
    before += of_tile;
  }
  if (chunks.count == 1) total = before;
  for (int64_t slot = int64_t{total} + chunk * kPackThreads + rank; slot < args.max_total;
       slot += int64_t{chunks.count} * kPackThreads) {
    args.kept_rows[slot] = -1;
  }
}

struct PackedRows {
  const PackTokensArgs& args;
  const PackTensor& t;

  struct Row {
    const char* from;
  };
  __device__ Row find(int64_t, int64_t, int64_t slot, int64_t byte, bool inside) const {
    const char* row = pack_source(t, args.kept_rows[inside ? slot : 0]);
    return {inside && row ? row + byte : nullptr};
  }
  template <int kBytes>
  __device__ typename detail::Word<kBytes>::type load(const Row& row) const {
    using Word = typename detail::Word<kBytes>::type;
    return row.from ? __ldg(reinterpret_cast<const Word*>(row.from)) : Word{};
  }
};

__global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerSm)
    pack_copy_kernel(const PackTokensArgs args, const CopyPlan<kPackMaxTensors> plan) {
  visit_chunk(plan, args.tensors, 1, args.max_total, blockIdx.x, [&](int i, int width, int64_t first, int64_t last) {
    const PackTensor& t = args.tensors[i];
    copy_rows_range(t, width, args.max_total, first, last, PackedRows{args, t});
  });
}

}  // namespace

int pack_tokens_cuda(const PackTokensArgs& args, CUstream_st* stream) {
  const PackChunks chunks = pack_chunks(args.total_tokens);
  const auto plan = plan_copy<kPackMaxTensors>(args.tensors, args.num_tensors, 1, args.max_total);
  const int64_t bounds = args.batch_size > 0 ? ceil_div<int64_t>(args.batch_size, kPackThreads / kWarpSize) : 1;
  if (!plan.fits || chunks.count + bounds > INT32_MAX) return cudaErrorInvalidValue;
  int error = cudaSuccess;
  const dim3 threads(kPackThreads);
  if (!args.rows_known && chunks.count > 1) {
    error = launch(pack_count_kernel, dim3(static_cast<unsigned>(chunks.count)), threads, sizeof(PackStorage), stream,
                   args, chunks);
  }
  if (!args.rows_known && error == cudaSuccess) {
    error = launch(pack_rows_kernel, dim3(static_cast<unsigned>(chunks.count + bounds)), threads, sizeof(PackStorage),
                   stream, args, chunks);
  }
  if (error != cudaSuccess) return error;
  return launch(pack_copy_kernel, dim3(static_cast<unsigned>(plan.first_chunk[plan.num_tensors])), dim3(kCopyThreads),
                0, stream, args, plan);
}

}  // namespace tokred
