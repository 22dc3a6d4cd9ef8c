// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: each kept row read and written once, and the lists. All tensors in one launch: a layer's hidden states,
// positions and KV together are a few MB, where every further launch would cost as much as the copy.
#include "common/copy_rows.cuh"
#include "common/launch.cuh"
#include "compact/gather_tokens.h"

namespace tokred {
namespace {

template <bool kSpans>
__global__ void __launch_bounds__(kCopyThreads, kSpans ? kCopyBlocksPerSm - 1 : kCopyBlocksPerSm)
    gather_tokens_kernel(const GatherTokensArgs args, const CopyPlan<kGatherMaxTensors> plan) {
  copy_chunk(plan, args.tensors, args.batch_size, args.k, blockIdx.x,
             [&](int tensor, int64_t batch, int64_t head, int64_t slot) {
               return gather_source<kSpans>(args, tensor, batch, head, slot);
             });
}

}  // namespace

int gather_tokens_cuda(const GatherTokensArgs& args, CUstream_st* stream) {
  const auto plan = plan_copy<kGatherMaxTensors>(args.tensors, args.num_tensors, args.batch_size, args.k);
  if (!plan.fits) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(plan.first_chunk[plan.num_tensors]));
  return args.keep_first + args.keep_last > 0
             ? launch(gather_tokens_kernel<true>, grid, dim3(kCopyThreads), 0, stream, args, plan)
             : launch(gather_tokens_kernel<false>, grid, dim3(kCopyThreads), 0, stream, args, plan);
}

}  // namespace tokred
