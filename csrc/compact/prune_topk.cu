// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: scores once, kept rows twice (read, write), 8 bytes of index each. Short rows (an image's tokens) are selected
// by one block each in about 2 us of latency; blocks that share a row repeat that instead of waiting for each other,
// and each copies its part of the kept rows: one launch. Longer rows are selected first and copied by a second launch;
// rows beyond 32,768 tokens are cut into chunks whose own top-k (a superset of the row's) are selected in parallel.
#include "common/copy_rows.cuh"
#include "common/launch.cuh"
#include "common/topk.cuh"
#include "compact/prune_topk.h"

namespace tokred {
namespace {

struct SelectStorage {
  BlockTopkScratch topk;
};

template <typename T>
__device__ inline uint32_t token_key(const T* score, int64_t first, const PruneTopkArgs& args, int64_t mask_offset,
                                     int token, bool crowded) {
  const int64_t at = mask_offset + token;
  if (args.drop_mask && args.drop_mask[at]) return kKeyExcluded;
  const bool forced = args.keep_mask && args.keep_mask[at];
  if (crowded && !forced) return kKeyExcluded;
  if (forced && !crowded) return kKeyForced;
  return score_key(static_cast<float>(score[first + token]));
}

// What a block needs to know of its row's masks before it can rank: how many tokens may be kept, and whether more than
// k are forced (then only they compete).
struct Eligible {
  int count;
  bool crowded;
};
__device__ inline Eligible block_eligible(const PruneTopkArgs& args, int64_t mask_offset, int len,
                                          BlockScratch& scratch) {
  if (!args.keep_mask && !args.drop_mask) return {len, false};
  int forced = 0, eligible = 0;
  for (int i = static_cast<int>(threadIdx.x); i < len; i += static_cast<int>(blockDim.x)) {
    const bool out = args.drop_mask && args.drop_mask[mask_offset + i];
    eligible += !out;
    forced += !out && args.keep_mask && args.keep_mask[mask_offset + i];
  }
  forced = block_sum(forced, scratch);
  eligible = block_sum(eligible, scratch);
  return forced > args.k ? Eligible{forced, true} : Eligible{eligible, false};
}

// Calls emit(slot, token) for the kept tokens of the block's row; returns how many there are. kItems 0 streams the row.
template <typename T, int kItems, typename Emit>
__device__ inline int select_row(const PruneTopkArgs& args, int64_t batch_idx, SelectStorage& shared, Emit&& emit) {
  const TokenSpan row = prune_topk_row(args, batch_idx);
  const int len = static_cast<int>(row.len);
  const int64_t mask_offset = args.cu_seqlens ? row.begin : batch_idx * args.num_tokens;
  const T* score = static_cast<const T*>(args.score) + batch_idx * args.stride_score;
  const Eligible eligible = block_eligible(args, mask_offset, len, shared.topk.block);
  const int k = static_cast<int>(args.k < eligible.count ? args.k : eligible.count);
  if (k == 0) return 0;  // the same in the whole block
  const auto key_at = [&](int token) {
    return token_key(score, row.begin, args, mask_offset, token, eligible.crowded);
  };
  if constexpr (kItems > 0) {
    RegisterKeys<kItems> keys;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int token = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      keys.key[i] = token < len ? key_at(token) : kKeyExcluded;
    }
    return block_topk_emit(keys, block_topk_bound(keys, k, shared.topk), shared.topk, emit);
  } else {
    const StreamKeys<decltype(key_at)> keys{key_at, len};
    return block_topk_emit(keys, block_topk_bound(keys, k, shared.topk), shared.topk, emit);
  }
}

__device__ inline void finish_row(const PruneTopkArgs& args, int64_t batch_idx, int count) {
  for (int64_t slot = count + static_cast<int64_t>(threadIdx.x); slot < args.k; slot += blockDim.x) {
    args.kept_idx[batch_idx * args.k + slot] = -1;
  }
  if (args.num_kept && threadIdx.x == 0) args.num_kept[batch_idx] = count;
}

template <typename T, int kItems>
__global__ void __launch_bounds__(kItems > 0 ? kPruneTopkMaxThreads : kPruneTopkStreamThreads)
    prune_topk_select_kernel(const PruneTopkArgs args) {
  TOKRED_SHARED(SelectStorage, shared);
  const int64_t batch_idx = blockIdx.x;
  int64_t* out = args.kept_idx + batch_idx * args.k;
  const int count = select_row<T, kItems>(args, batch_idx, shared, [&](int slot, int token) { out[slot] = token; });
  finish_row(args, batch_idx, count);
}

// grid: batch_size * splits. The tail of the shared memory holds the row's list, k int32.
template <typename T, int kItems>
__global__ void __launch_bounds__(kPruneTopkMaxThreads) prune_topk_fused_kernel(const PruneTopkArgs args, int splits) {
  TOKRED_SHARED(SelectStorage, shared);
  TOKRED_SHARED_TAIL(SelectStorage, tail);
  int* kept = reinterpret_cast<int*>(tail);
  const int64_t batch_idx = blockIdx.x / splits;
  const int split = static_cast<int>(blockIdx.x % splits);
  const int k = static_cast<int>(args.k);
  const int count = select_row<T, kItems>(args, batch_idx, shared, [&](int slot, int token) { kept[slot] = token; });
  for (int slot = count + static_cast<int>(threadIdx.x); slot < k; slot += static_cast<int>(blockDim.x))
    kept[slot] = -1;
  __syncthreads();  // the list is whole
  if (split == 0) {
    for (int slot = static_cast<int>(threadIdx.x); slot < k; slot += static_cast<int>(blockDim.x)) {
      args.kept_idx[batch_idx * k + slot] = kept[slot];
    }
    if (args.num_kept && threadIdx.x == 0) args.num_kept[batch_idx] = count;
  }
  const int64_t begin = prune_topk_row(args, batch_idx).begin;
  for (int t = 0; t < args.num_tensors; ++t) {
    const RowTensor& tensor = args.tensors[t];
    const int width = copy_width(tensor);
    const int64_t units = k * (tensor.row_bytes / width), share = ceil_div<int64_t>(units, splits);
    const int64_t first = split * share, last = first + share < units ? first + share : units;
    copy_range(tensor, width, k, batch_idx * units + first, batch_idx * units + last,
               [&](int64_t, int64_t, int64_t slot) -> int64_t { return kept[slot] < 0 ? -1 : begin + kept[slot]; });
  }
}

// Long dense rows without forced tokens. grid: batch_size * num_chunks; writes the top chunk_slots of each chunk.
template <typename T, int kItems>
__global__ void __launch_bounds__(kPruneTopkMaxThreads)
    prune_topk_chunk_kernel(const PruneTopkArgs args, int num_chunks, int chunk_slots) {
  TOKRED_SHARED(SelectStorage, shared);
  const int64_t batch_idx = blockIdx.x / num_chunks;
  const int chunk = static_cast<int>(blockIdx.x % num_chunks);
  const int chunk_tokens = kItems * static_cast<int>(blockDim.x);
  const int64_t first = int64_t{chunk} * chunk_tokens;
  const T* score = static_cast<const T*>(args.score) + batch_idx * args.stride_score;
  RegisterKeys<kItems> keys;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int token = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    keys.key[i] = first + token < args.num_tokens
                      ? token_key(score, first, args, batch_idx * args.num_tokens + first, token, false)
                      : kKeyExcluded;
  }
  int eligible = 0;
  keys.for_each([&](uint32_t key) { eligible += key != kKeyExcluded; });
  eligible = block_sum(eligible, shared.topk.block);
  const int64_t slots = int64_t{num_chunks} * chunk_slots;
  uint32_t* out_key = args.workspace + batch_idx * slots + int64_t{chunk} * chunk_slots;
  uint32_t* out_token = out_key + args.batch_size * slots;
  int count = 0;
  if (eligible > 0) {
    const TopkBound bound = block_topk_bound(keys, min(chunk_slots, eligible), shared.topk);
    count = block_topk_emit(keys, bound, shared.topk, [&](int slot, int token) {
      out_token[slot] = static_cast<uint32_t>(first) + static_cast<uint32_t>(token);
      out_key[slot] = token_key(score, first, args, batch_idx * args.num_tokens + first, token, false);
    });
  }
  for (int slot = count + static_cast<int>(threadIdx.x); slot < chunk_slots; slot += static_cast<int>(blockDim.x)) {
    out_key[slot] = kKeyExcluded;
    out_token[slot] = 0;
  }
}

// The candidates of all chunks stand in token order, so the row's selection is the selection from them.
template <int kItems>
__global__ void __launch_bounds__(kPruneTopkMaxThreads) prune_topk_merge_kernel(const PruneTopkArgs args, int slots) {
  TOKRED_SHARED(SelectStorage, shared);
  const int64_t batch_idx = blockIdx.x;
  const uint32_t* key = args.workspace + batch_idx * slots;
  const uint32_t* token = key + args.batch_size * slots;
  RegisterKeys<kItems> keys;
  int eligible = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    keys.key[i] = at < slots ? key[at] : kKeyExcluded;
    eligible += keys.key[i] != kKeyExcluded;
  }
  eligible = block_sum(eligible, shared.topk.block);
  const int k = min(static_cast<int>(args.k), eligible);
  int count = 0;
  if (k > 0) {
    int64_t* out = args.kept_idx + batch_idx * args.k;
    count = block_topk_emit(keys, block_topk_bound(keys, k, shared.topk), shared.topk,
                            [&](int slot, int at) { out[slot] = token[at]; });
  }
  finish_row(args, batch_idx, count);
}

__global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerSm)
    prune_topk_copy_kernel(const PruneTopkArgs args, const CopyPlan<kPruneTopkMaxTensors> plan) {
  copy_chunk(plan, args.tensors, args.batch_size, args.k, blockIdx.x,
             [&](int, int64_t batch, int64_t, int64_t slot) -> int64_t {
               const int64_t token = args.kept_idx[batch * args.k + slot];
               return token < 0 ? -1 : token + prune_topk_row(args, batch).begin;
             });
}

template <typename T>
int select(const PruneTopkArgs& args, const PruneTopkPolicy& policy, CUstream_st* stream) {
  const dim3 block(static_cast<unsigned>(policy.threads));
  const unsigned batch = static_cast<unsigned>(args.batch_size);
  int error = cudaErrorInvalidValue;
  if (policy.num_chunks > 1) {
    constexpr int kChunkItems = kPruneTopkRegisterKeys / 4 / kPruneTopkMaxThreads;
    error = launch(prune_topk_chunk_kernel<T, kChunkItems>, dim3(batch * policy.num_chunks), block,
                   sizeof(SelectStorage), stream, args, policy.num_chunks, policy.chunk_slots);
    if (error != cudaSuccess) return error;
    const bool known = dispatch_int<1, 2, 4, 8, 16, 32>(policy.items, [&](auto items) {
      error = launch(prune_topk_merge_kernel<decltype(items)::value>, dim3(batch), block, sizeof(SelectStorage), stream,
                     args, policy.num_chunks * policy.chunk_slots);
    });
    return known ? error : static_cast<int>(cudaErrorInvalidValue);
  }
  if (policy.fused) {
    const int splits = static_cast<int>(prune_topk_splits(args.batch_size, args.k, args.tensors[0].row_bytes));
    const size_t shared_bytes = shared_bytes_with_tail<SelectStorage>(static_cast<size_t>(args.k) * sizeof(int));
    const bool known = dispatch_int<1, 2, 4>(policy.items, [&](auto items) {
      error = launch(prune_topk_fused_kernel<T, decltype(items)::value>, dim3(batch * splits), block, shared_bytes,
                     stream, args, splits);
    });
    return known ? error : static_cast<int>(cudaErrorInvalidValue);
  }
  const bool known = dispatch_int<0, 8, 16, 32>(policy.items, [&](auto items) {
    error = launch(prune_topk_select_kernel<T, decltype(items)::value>, dim3(batch), block, sizeof(SelectStorage),
                   stream, args);
  });
  return known ? error : static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace

int prune_topk_cuda(const PruneTopkArgs& args, CUstream_st* stream) {
  if (args.batch_size == 0) return cudaSuccess;
  PruneTopkPolicy policy =
      choose_policy(args.max_seqlen, args.k, args.keep_mask != nullptr, args.cu_seqlens != nullptr);
  // A packed call may ask for more slots than its rows have tokens; a list that long is not kept in shared memory.
  if (args.k > kPruneTopkFusedTokens)
    policy = {policy.fused ? kPruneTopkMaxThreads : policy.threads, policy.fused ? 8 : policy.items, policy.num_chunks,
              policy.chunk_slots, false};
  int error = cudaErrorInvalidValue;
  dispatch_float(args.score_dtype,
                 [&](auto tag) { error = select<typename decltype(tag)::type>(args, policy, stream); });
  if (error != cudaSuccess || policy.fused || args.k == 0) return error;
  const auto plan = plan_copy<kPruneTopkMaxTensors>(args.tensors, args.num_tensors, args.batch_size, args.k);
  if (!plan.fits) return cudaErrorInvalidValue;
  return launch(prune_topk_copy_kernel, dim3(static_cast<unsigned>(plan.first_chunk[plan.num_tensors])),
                dim3(kCopyThreads), 0, stream, args, plan);
}

}  // namespace tokred
