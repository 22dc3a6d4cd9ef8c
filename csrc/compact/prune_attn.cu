// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: K read once, kept rows twice. Where rows are many or short, the block of a row makes its logits into shared
// memory, the scores from them, selects and copies: one launch. Else all SMs make the logits (common/qk_rows.cu) and a
// second launch does the rest; its blocks share a row's copying, and each of them repeats what comes before, which is a
// thirtieth of K and lies in L2. Rows that no block holds take a launch for the sums, one for the scores, and
// prune_topk's.
//
// A head's sum of exponentials is made of stretches of fixed length that are merged in their order, and a key's score
// is added up head by head: the bits are the same whichever way a row goes.
#include "common/exp_sum.cuh"
#include "common/qk_tile.cuh"
#include "compact/prune_attn.h"
#include "compact/prune_rows.cuh"

namespace tokred {
namespace {

constexpr int kStretch = 512;  // keys; 16 values in registers of a lane

// The logits of a row of the batch: head h from data + h * stride on.
struct RowLogits {
  const float* data;
  int64_t stride;
};
__device__ inline RowLogits logits_of(const PruneAttnArgs& a, int64_t batch_idx, const TokenSpan& keys) {
  return {a.qk.out + a.qk.logits_at(batch_idx, 0, keys), a.qk.logits_stride()};
}

// On the base-2 scale.
__device__ inline float logit2(const float* logits, const float* bias, int64_t key) {
  return (bias ? logits[key] + bias[key] : logits[key]) * kLog2e;
}

// Over keys [begin, begin + kStretch), as far as there are such. Valid in every lane.
__device__ inline ExpSum warp_sum_stretch(const float* logits, const float* bias, int64_t begin, int64_t num_keys) {
  float x[kStretch / kWarpSize];
  ExpSum part;
#pragma unroll
  for (int i = 0; i < kStretch / kWarpSize; ++i) {
    const int64_t key = begin + i * kWarpSize + lane_index();
    x[i] = key < num_keys ? logit2(logits, bias, key) : -INFINITY;
    part.peak = fmaxf(part.peak, x[i]);
  }
  part.peak = warp_max(part.peak);
  const float base = ExpSum::safe(part.peak);
#pragma unroll
  for (int i = 0; i < kStretch / kWarpSize; ++i) part.sum += fast_exp2(x[i] - base);
  part.sum = warp_sum(part.sum);
  return part;
}

// What makes logits of a head attention: 2^(logit - base) * factor. A head that sees no key gives 0.
struct Normalizer {
  float base, factor;
};
__device__ inline Normalizer normalizer_of(const ExpSum& x) {
  return {ExpSum::safe(x.peak), x.sum == 0.f ? 0.f : 1.f / x.sum};
}

// The score of a key, which exists.
__device__ inline float score_of(const PruneAttnArgs& a, const RowLogits& logits, const Normalizer* normalizer,
                                 int64_t batch_idx, const TokenSpan& keys, int64_t key) {
  const int heads = static_cast<int>(a.qk.num_q_heads);
  const float* at = logits.data + key;
  float score = 0.f;
#pragma unroll 4
  for (int head = 0; head < heads; ++head, at += logits.stride) {
    float x = *at;
    if (a.key_bias) x += a.bias(batch_idx, head, keys)[key];
    const float p = fast_exp2(x * kLog2e - normalizer[head].base) * normalizer[head].factor;
    score = a.reduce == HeadReduce::kMax ? max_nan(score, p) : score + p;
  }
  return a.reduce == HeadReduce::kMean ? score * (1.f / static_cast<float>(heads)) : score;
}
__device__ inline float score_of_token(const PruneAttnArgs& a, const RowLogits& logits, const Normalizer* normalizer,
                                       int64_t batch_idx, const TokenSpan& keys, int64_t token) {
  const int64_t key = a.first_key + token;
  return key < keys.len ? score_of(a, logits, normalizer, batch_idx, keys, key) : 0.f;
}

// In shared memory behind the struct of a kernel: prune_attn_words(...).
struct RowMemory {
  Normalizer* normalizer;  // [num_q_heads]
  float* score;            // [max_seqlen]
  int* kept;               // [k]
  float* logits;           // [num_q_heads, kv_len], where one launch does all
  __device__ RowMemory(const PruneAttnArgs& a, unsigned char* tail)
      : normalizer(reinterpret_cast<Normalizer*>(tail)),
        score(reinterpret_cast<float*>(normalizer + a.qk.num_q_heads)),
        kept(reinterpret_cast<int*>(score + a.prune.rows.max_seqlen)),
        logits(reinterpret_cast<float*>(kept + a.prune.rows.k)) {}
};

// From a row's logits to its kept tokens. Called by all threads of the block.
template <int kItems>
__device__ inline void block_prune(const PruneAttnArgs& a, int64_t batch_idx, const TokenSpan& keys,
                                   const RowLogits& logits, int split, int splits, BlockTeam& team,
                                   const RowMemory& memory) {
  const int num_warps = num_threads_in_block() / kWarpSize;
  for (int head = warp_index(); head < static_cast<int>(a.qk.num_q_heads); head += num_warps) {
    ExpSum total;
    for (int64_t begin = 0; begin < keys.len; begin += kStretch) {
      const ExpSum part =
          warp_sum_stretch(logits.data + head * logits.stride, a.bias(batch_idx, head, keys), begin, keys.len);
      total.merge(part.peak, part.sum);
    }
    if (lane_index() == 0) memory.normalizer[head] = normalizer_of(total);
  }
  __syncthreads();  // all sums are there
  const TokenSpan tokens = topk_span(a.prune.rows, batch_idx);
  float* out = a.scores_of(batch_idx, tokens);
  const int64_t num_scores = split == 0 ? a.num_scores(batch_idx, tokens) : tokens.len;
  for (int64_t token = thread_rank(); token < num_scores; token += num_threads_in_block()) {
    const float score = token < tokens.len ? score_of_token(a, logits, memory.normalizer, batch_idx, keys, token) : 0.f;
    if (token < tokens.len) memory.score[token] = score;
    if (split == 0) out[token] = score;
  }
  __syncthreads();  // all scores are there
  TopkRow<float> row = topk_row<float>(a.prune.rows, batch_idx);
  row.score = memory.score;
  block_select_and_copy<kItems>(a.prune, batch_idx, row, split, splits, team, memory.kept);
}

template <typename T, int kDim>
struct OneLaunchStorage {
  QkStorage<T, kDim> queries;
  BlockTopkScratch topk;
};

// grid: batch_size.
template <typename T, int kDim>
__global__ void __launch_bounds__(kPruneAttnThreads, QkTile<T, kDim>::kLoads > 4 ? 1 : 2)
    prune_attn_one_launch_kernel(const PruneAttnArgs a, const bool wide) {
  using S = OneLaunchStorage<T, kDim>;
  TOKRED_SHARED_BYTES(bytes);
  S& shared = *reinterpret_cast<S*>(bytes);
  const RowMemory memory(a, bytes + shared_tail_offset<S>());
  const int64_t batch_idx = blockIdx.x;
  const TokenSpan keys = a.qk.keys(batch_idx);
  const int64_t group = a.qk.group(), kv_len = a.qk.kv_len;
  for (int64_t kv_head = 0; kv_head < a.qk.num_kv_heads; ++kv_head) {
    const T* k =
        static_cast<const T*>(a.qk.k.data) + a.qk.k.head_offset(batch_idx, kv_head) + keys.begin * a.qk.k.stride_token;
    for (int64_t first = 0; first < group; first += QkTile<T, kDim>::kHeld) {
      const int rows =
          static_cast<int>(ceil_div<int64_t>(min(group - first, int64_t{QkTile<T, kDim>::kHeld}), kQkTileRows)) *
          kQkTileRows;
      block_stage_queries(a.qk, batch_idx, kv_head, first, rows, shared.queries);
      float* out = memory.logits + kv_head * group * kv_len;
      block_multiply_keys(a.qk, shared.queries, k, batch_idx, 0, static_cast<int>(keys.len), keys.len, rows, wide,
                          [&](int tile, int key, unsigned readable, const float (&acc)[4]) {
                            thread_visit_tile(
                                a.qk, first + tile, group, key, static_cast<int>(keys.len), readable, acc,
                                [&](int64_t row, int at, float score) { out[row * kv_len + at] = score; });
                          });
    }
  }
  __syncthreads();  // all logits are there
  BlockTeam team(shared.topk);
  block_prune<kPruneAttnItems>(a, batch_idx, keys, {memory.logits, kv_len}, 0, 1, team, memory);
}

struct PruneStorage {
  BlockTopkScratch topk;
};

// grid: batch_size * splits.
template <int kItems>
__global__ void __launch_bounds__(1024) prune_attn_select_kernel(const PruneAttnArgs a, int splits) {
  TOKRED_SHARED_BYTES(bytes);
  PruneStorage& shared = *reinterpret_cast<PruneStorage*>(bytes);
  const RowMemory memory(a, bytes + shared_tail_offset<PruneStorage>());
  const int64_t batch_idx = blockIdx.x / splits;
  const TokenSpan keys = a.qk.keys(batch_idx);
  BlockTeam team(shared.topk);
  block_prune<kItems>(a, batch_idx, keys, logits_of(a, batch_idx, keys), static_cast<int>(blockIdx.x % splits), splits,
                      team, memory);
}

// grid: batch_size * num_q_heads.
__global__ void __launch_bounds__(kPruneAttnThreads) prune_attn_sum_kernel(const PruneAttnArgs a) {
  TOKRED_SHARED_BYTES(bytes);  // not as a struct: ExpSum has initialisers
  ExpSum* parts = reinterpret_cast<ExpSum*>(bytes);
  constexpr int kWarps = kPruneAttnThreads / kWarpSize;
  const unsigned heads = static_cast<unsigned>(a.qk.num_q_heads);
  const int64_t batch_idx = blockIdx.x / heads;
  const int head = static_cast<int>(blockIdx.x % heads);
  const TokenSpan keys = a.qk.keys(batch_idx);
  const RowLogits logits = logits_of(a, batch_idx, keys);
  ExpSum total;
  for (int64_t begin = 0; begin < keys.len; begin += kWarps * kStretch) {
    const ExpSum part = warp_sum_stretch(logits.data + head * logits.stride, a.bias(batch_idx, head, keys),
                                         begin + warp_index() * kStretch, keys.len);
    if (lane_index() == 0) parts[warp_index()] = part;
    __syncthreads();  // the parts of this round are there
    for (int w = 0; w < kWarps; ++w) total.merge(parts[w].peak, parts[w].sum);
    __syncthreads();  // and read
  }
  if (thread_rank() == 0) reinterpret_cast<Normalizer*>(a.normalizer)[blockIdx.x] = normalizer_of(total);
}

// grid: batch_size * tiles; each block makes every tiles-th stretch of scores.
__global__ void __launch_bounds__(kPruneAttnThreads) prune_attn_score_kernel(const PruneAttnArgs a, int tiles) {
  const int64_t batch_idx = blockIdx.x / tiles;
  const TokenSpan keys = a.qk.keys(batch_idx), tokens = topk_span(a.prune.rows, batch_idx);
  const RowLogits logits = logits_of(a, batch_idx, keys);
  const Normalizer* normalizer = reinterpret_cast<const Normalizer*>(a.normalizer) + batch_idx * a.qk.num_q_heads;
  float* out = a.scores_of(batch_idx, tokens);
  const int64_t num_scores = a.num_scores(batch_idx, tokens), step = int64_t{tiles} * kPruneAttnThreads;
  for (int64_t t = int64_t{blockIdx.x % static_cast<unsigned>(tiles)} * kPruneAttnThreads + thread_rank();
       t < num_scores; t += step) {
    out[t] = t < tokens.len ? score_of_token(a, logits, normalizer, batch_idx, keys, t) : 0.f;
  }
}

dim3 blocks(int64_t n) { return dim3(static_cast<unsigned>(n)); }

int launch_one(const PruneAttnArgs& a, CUstream_st* stream) {
  const bool wide = has_wide_rows(a.qk.k, a.qk.dtype);
  int error = cudaErrorInvalidValue;
  dispatch_float(a.qk.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    (void)dispatch_int<64, 128, 256>(choose_qk_policy(a.qk).tile_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      error =
          launch(prune_attn_one_launch_kernel<T, kDim>, blocks(a.prune.rows.num_rows), dim3(kPruneAttnThreads),
                 shared_bytes_with_tail<OneLaunchStorage<T, kDim>>(4 * static_cast<size_t>(prune_attn_words(a, true))),
                 stream, a, wide);
    });
  });
  return error;
}

int launch_select(const PruneAttnArgs& a, CUstream_st* stream) {
  const TopkRows& rows = a.prune.rows;
  const PruneTopkPolicy policy = choose_policy(rows.max_seqlen, rows.k);
  const int splits = static_cast<int>(prune_attn_splits(a));
  int error = cudaErrorInvalidValue;
  (void)dispatch_int<1, 2, 4>(policy.items, [&](auto items) {
    error = launch(
        prune_attn_select_kernel<decltype(items)::value>, blocks(rows.num_rows * splits), dim3(policy.threads),
        shared_bytes_with_tail<PruneStorage>(4 * static_cast<size_t>(prune_attn_words(a, false))), stream, a, splits);
  });
  return error;
}

}  // namespace

int prune_attn_cuda(const PruneAttnArgs& a, CUstream_st* stream) {
  const TopkRows& rows = a.prune.rows;
  if (rows.num_rows == 0) return cudaSuccess;
  const PruneAttnPolicy policy = choose_policy(a);
  if (policy.one_launch) return launch_one(a, stream);
  int error = qk_rows_cuda(a.qk, stream);
  if (error != cudaSuccess) return error;
  if (policy.in_block) return launch_select(a, stream);
  error = launch(prune_attn_sum_kernel, blocks(rows.num_rows * a.qk.num_q_heads), dim3(kPruneAttnThreads),
                 kPruneAttnThreads / kWarpSize * sizeof(ExpSum), stream, a);
  if (error != cudaSuccess) return error;
  const int tiles = static_cast<int>(std::max<int64_t>(1, ceil_div<int64_t>(rows.max_seqlen, kPruneAttnThreads)));
  error = launch(prune_attn_score_kernel, blocks(rows.num_rows * tiles), dim3(kPruneAttnThreads), 0, stream, a, tiles);
  if (error != cudaSuccess) return error;
  return prune_topk_cuda(a.prune, stream);
}

}  // namespace tokred
