// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: every output row written once, every row that is used read once (repeats come from L2), and the map.
#include "common/copy_rows.cuh"
#include "common/launch.cuh"
#include "merge/segment_expand.h"

namespace tokred {
namespace {

__global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerSm)
    segment_expand_kernel(const SegmentExpandArgs args, int width, int64_t units) {
  const int64_t first = int64_t{blockIdx.x} * kCopyChunk;
  const int64_t last = min(first + kCopyChunk, units);
  const SegmentExpandSource source{args.dst_idx, args.num_tokens, args.num_out};
  copy_range(args.rows, width, args.num_tokens, first, last, source);
}

}  // namespace

int segment_expand_cuda(const SegmentExpandArgs& args, CUstream_st* stream) {
  const int64_t rows = args.batch_size * args.num_tokens, chunks = copy_chunks(args.rows, rows);
  if (chunks > INT32_MAX || !copy_fits(args.rows, args.batch_size, args.num_tokens)) return cudaErrorInvalidValue;
  return launch(segment_expand_kernel, dim3(static_cast<unsigned>(chunks)), dim3(kCopyThreads), 0, stream, args,
                copy_width(args.rows), copy_units(args.rows, rows));
}

}  // namespace tokred
