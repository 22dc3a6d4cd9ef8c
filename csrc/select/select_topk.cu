// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: scores and masks read once, 8 bytes written per kept token. The selection is common/topk_rows.cu's; a list of
// up to 4,096 tokens is completed and sorted there, while it is in shared memory. Longer lists come back here.
#include "common/launch.cuh"
#include "common/topk_rows.cuh"
#include "select/select_topk.h"

namespace tokred {
namespace {

// One thread per place. kept_idx ascends.
__global__ void __launch_bounds__(kSelectTopkThreads) select_topk_rest_kernel(const TopkRows args) {
  const int64_t at = int64_t{blockIdx.x} * kSelectTopkThreads + threadIdx.x;
  if (at >= args.num_rows * args.num_rest) return;
  const int64_t row_idx = at / args.num_rest, j = at - row_idx * args.num_rest;
  const int64_t* kept = args.kept_idx + row_idx * args.k;
  const int count = args.num_kept[row_idx];
  const int64_t rest = topk_span(args, row_idx / args.num_heads).len - count;
  args.rest_idx[at] = j < rest ? rest_token(j, count, [&](int i) { return kept[i]; }) : -1;
}

}  // namespace

int select_topk_cuda(const TopkRows& args, CUstream_st* stream) {
  const TopkPolicy policy = choose_policy(args);
  int error = topk_rows_cuda(args, policy, stream);
  if (error != cudaSuccess || policy.listed) return error;
  if (args.rest_idx) {
    const int64_t total = args.num_rows * args.num_rest;
    error = launch(select_topk_rest_kernel, dim3(static_cast<unsigned>(ceil_div<int64_t>(total, kSelectTopkThreads))),
                   dim3(kSelectTopkThreads), 0, stream, args);
  }
  if (error != cudaSuccess || !args.by_score) return error;
  uint32_t* keys = args.workspace + select_topk_sort_offset(policy, args.num_rows);
  return sort_lists_cuda(args, reinterpret_cast<unsigned long long*>(keys), stream);
}

}  // namespace tokred
