// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: scores once, kept rows twice (read, write), 8 bytes of index each. Short rows (an image's tokens) are selected
// by one block each in about 2 us of latency; blocks that share a row repeat that instead of waiting for each other,
// and each copies its part of the kept rows: one launch. Longer rows are selected first (common/topk_rows.cu) and
// copied by a last launch.
#include "common/launch.cuh"
#include "compact/prune_rows.cuh"

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
  const int64_t batch_idx = blockIdx.x / splits;
  BlockTeam team(shared.topk);
  block_select_and_copy<kItems>(args, batch_idx, topk_row<T>(args.rows, batch_idx),
                                static_cast<int>(blockIdx.x % splits), splits, team, reinterpret_cast<int*>(tail));
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
