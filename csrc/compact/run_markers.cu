// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: the mask read, two masks written, 20 KB for the largest screenshot: a launch. Some of its blocks write the
// masks, which depend on neighbours alone; the others count the runs of a sequence each, reading the mask again.
#include "common/block.cuh"
#include "common/launch.cuh"
#include "compact/run_markers.h"

namespace tokred {
namespace {

constexpr int kMarkThreads = 512, kMarkItems = 4;

struct MarkStorage {
  BlockScratch block;
};

// Whether a sequence ends behind token i.
__device__ inline bool ends_sequence(const RunMarkersArgs& args, int64_t i) {
  if (i + 1 == args.total_tokens) return true;
  if (!args.cu_seqlens) {
    return (static_cast<uint32_t>(i) + 1) % static_cast<uint32_t>(args.num_tokens) == 0;
  }
  int64_t low = 0, high = args.batch_size;  // the first bound that is not before i + 1
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (args.cu_seqlens[middle] < i + 1) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return args.cu_seqlens[low] == i + 1;
}

// grid: mask_blocks, then a block per sequence.
__global__ void __launch_bounds__(kMarkThreads) run_markers_kernel(const RunMarkersArgs args, int mask_blocks) {
  TOKRED_SHARED(MarkStorage, shared);
  const int block = static_cast<int>(blockIdx.x);
  if (block < mask_blocks) {
    const int64_t first = int64_t{block} * kMarkThreads * kMarkItems + threadIdx.x;
#pragma unroll
    for (int item = 0; item < kMarkItems; ++item) {
      const int64_t i = first + item * kMarkThreads;
      if (i >= args.total_tokens) return;
      const bool kept = args.keep[i];
      const bool ends = !kept && (ends_sequence(args, i) || args.keep[i + 1]);
      args.marker[i] = ends;
      args.kept_or_marker[i] = ends || kept;
    }
    return;
  }
  const int64_t b = block - mask_blocks;
  const TokenSpan span = marker_span(args, b);
  const uint8_t* keep = args.keep + span.begin;
  int runs = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < span.len; i += kMarkThreads) {
    runs += !keep[i] && (i + 1 == span.len || keep[i + 1]);
  }
  runs = block_sum(runs, shared.block);
  if (threadIdx.x == 0) args.num_runs[b] = runs;
}

}  // namespace

int run_markers_cuda(const RunMarkersArgs& args, CUstream_st* stream) {
  const int64_t mask_blocks = ceil_div<int64_t>(args.total_tokens, kMarkThreads * kMarkItems);
  if (mask_blocks + args.batch_size > INT32_MAX) return cudaErrorInvalidValue;
  return launch(run_markers_kernel, dim3(static_cast<unsigned>(mask_blocks + args.batch_size)), dim3(kMarkThreads),
                sizeof(MarkStorage), stream, args, static_cast<int>(mask_blocks));
}

}  // namespace tokred
