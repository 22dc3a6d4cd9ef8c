// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// bipartite_match's second launch: combines what the blocks of the first have found, ranks the sources and numbers the
// output rows. Included by bipartite_match.cu alone.
#pragma once
#include "common/topk.cuh"
#include "merge/bipartite_match.h"

namespace tokred {
namespace {

// The first destination that a source of the row may take, after first_dst; valid in every thread.
__device__ inline int block_first_free(const uint8_t* protect, const BipartiteSets& sets, BlockScratch& scratch) {
  if (!protect) return 0;
  const int num_dst = static_cast<int>(sets.candidate_dst());
  int first = num_dst;
  for (int j = static_cast<int>(threadIdx.x); j < num_dst; j += static_cast<int>(blockDim.x)) {
    if (!protect[2 * (sets.first_dst + j) + 1]) first = min(first, j);
  }
  first = block_min(first, scratch);
  return first < num_dst ? first : 0;
}

// What the shares have found for candidate source i of a row.
struct SourceMatch {
  uint32_t key;  // its place in the order of merging
  float score;
  int64_t token;  // of the destination, -1: there is none
};
__device__ inline SourceMatch combine(const BipartiteMatchArgs& args, const BipartiteSets& sets, int64_t batch_idx,
                                      int num_splits, int i, int first_free) {
  const int64_t token = batch_idx * args.num_tokens + 2 * (sets.first_src + i);
  const bool blocked = args.protect && args.protect[token];
  const float lowest = -__uint_as_float(0x7f800000u);
  if (sets.candidate_dst() == 0) return {kKeyExcluded, lowest, -1};
  unsigned long long packed = 0;
  for (int split = 0; split < num_splits; ++split) {
    const auto at = (split * args.batch_size + batch_idx) * sets.candidate_src() + i;
    packed = max(packed, static_cast<unsigned long long>(args.partial[at]));
  }
  const uint32_t key = packed ? static_cast<uint32_t>(packed >> 32) : kKeyNaN;
  const int j = packed ? static_cast<int>(0xffffffffu - static_cast<uint32_t>(packed)) : first_free;
  const float score = packed ? __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key) : __uint_as_float(0x7fc00000u);
  return {blocked ? kKeyExcluded : key, blocked ? lowest : score, 2 * (sets.first_dst + j) + 1};
}

// Outputs that follow from the position alone: of destination i, and of source i where it is no candidate.
__device__ inline void write_unmatched(const BipartiteMatchArgs& args, const BipartiteSets& sets, int64_t batch_idx,
                                       int64_t i) {
  const int64_t at = batch_idx * args.num_tokens + 2 * i;
  const float lowest = -__uint_as_float(0x7f800000u);
  if (i < sets.first_src) {
    args.match_idx[at] = -1;
    args.score[at] = lowest;
  }
  if (i < sets.num_dst) {
    args.match_idx[at + 1] = -1;
    args.score[at + 1] = lowest;
  }
}

struct NumberStorage {
  BlockTopkScratch topk;
};

// Orders "index" and "grouped": one block per row selects the merged sources and counts them before each token.
// kItems keys of each thread stay in registers; 0: they are read from score again.
template <int kItems>
__global__ void __launch_bounds__(kBipartiteNumberThreads, 1)
    bipartite_number_kernel(const BipartiteMatchArgs args, int num_splits) {
  TOKRED_SHARED(NumberStorage, shared);
  const BipartiteSets sets = bipartite_sets(args.num_tokens, args.num_protected);
  const int64_t batch_idx = blockIdx.x;
  const int n = static_cast<int>(sets.candidate_src()), threads = static_cast<int>(blockDim.x);
  int64_t* match_idx = args.match_idx + batch_idx * args.num_tokens;
  float* score = args.score + batch_idx * args.num_tokens;
  int64_t* row_of = args.dst_idx + batch_idx * args.num_tokens;
  const uint8_t* protect = args.protect ? args.protect + batch_idx * args.num_tokens : nullptr;
  const int first_free = block_first_free(protect, sets, shared.topk.block);
  const bool by_index = args.order == MatchOrder::kIndex;
  const int64_t num_unmerged = sets.num_src - args.r;

  BlockTeam team(shared.topk);
  const auto match = [&](int i) {
    const SourceMatch found = combine(args, sets, batch_idx, num_splits, i, first_free);
    match_idx[2 * (sets.first_src + i)] = found.token;
    score[2 * (sets.first_src + i)] = found.score;
    return found.key;
  };
  for (int64_t i = threadIdx.x; i < sets.num_src; i += threads) write_unmatched(args, sets, batch_idx, i);
  for (int64_t i = threadIdx.x; i < sets.first_src; i += threads) {  // before all merged sources
    row_of[2 * i] = by_index ? 2 * i : i;
    if (i < sets.num_dst) row_of[2 * i + 1] = by_index ? 2 * i + 1 : num_unmerged + i;
  }

  const auto number = [&](const auto& keys) {
    const int r = static_cast<int>(args.r);
    const TopkBound bound = topk_bound(keys, r, team);
    topk_visit(keys, bound, team, [&](int i, uint32_t, int gone_before, bool merged) {
      if (i >= n) return;
      const int64_t src = sets.first_src + i;
      row_of[2 * src] = merged ? -1 : (by_index ? 2 * src : src) - gone_before;
      if (src < sets.num_dst) {
        row_of[2 * src + 1] = by_index ? 2 * src + 1 - gone_before - merged : num_unmerged + src;
      }
    });
  };
  if constexpr (kItems > 0) {
    number(register_keys<kItems>(team, n, match));
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += threads) match(i);
    const auto key_at = [&](int i) {  // of a source that this thread has matched
      const int64_t token = 2 * (sets.first_src + i);
      return protect && protect[token] ? kKeyExcluded : score_key(score[token]);
    };
    number(StreamKeys<decltype(key_at)>{key_at, n});
  }
  __syncthreads();  // the rows of all destinations are written
  for (int64_t i = sets.first_src + threadIdx.x; i < sets.num_src; i += threads) {
    if (row_of[2 * i] < 0) row_of[2 * i] = row_of[match_idx[2 * i]];
  }
}

struct RankStorage {
  BlockScratch block;
  unsigned long long tile[kBipartiteRankThreads];
};

// Order "score": a source's rank is the number of sources before it, counted by comparing it with all: quadratic, but
// spread over all SMs and a fraction of the matching's own quadratic work. grid: batch_size * blocks of sources.
__global__ void __launch_bounds__(kBipartiteRankThreads)
    bipartite_rank_kernel(const BipartiteMatchArgs args, int num_splits) {
  TOKRED_SHARED(RankStorage, shared);
  const BipartiteSets sets = bipartite_sets(args.num_tokens, args.num_protected);
  const int num_blocks = static_cast<int>(ceil_div<int64_t>(sets.num_src, kBipartiteRankThreads));
  const int64_t batch_idx = blockIdx.x / static_cast<unsigned>(num_blocks);
  const int64_t src = int64_t{blockIdx.x % static_cast<unsigned>(num_blocks)} * kBipartiteRankThreads + threadIdx.x;
  const int n = static_cast<int>(sets.candidate_src());
  const uint8_t* protect = args.protect ? args.protect + batch_idx * args.num_tokens : nullptr;
  const int first_free = block_first_free(protect, sets, shared.block);
  // Larger is earlier: the key, then the lower index. Unique, and never 0.
  const auto place_of = [&](int i) {
    const uint32_t key = combine(args, sets, batch_idx, num_splits, i, first_free).key;
    return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - static_cast<unsigned>(i));
  };
  const bool candidate = src >= sets.first_src && src < sets.num_src;
  const int own = static_cast<int>(src - sets.first_src);
  const unsigned long long place = candidate ? place_of(own) : ~0ull;
  int rank = 0;
  for (int begin = 0; begin < n; begin += kBipartiteRankThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    shared.tile[threadIdx.x] = i < n ? place_of(i) : 0;
    __syncthreads();  // the tile is whole
#pragma unroll 8
    for (int t = 0; t < kBipartiteRankThreads; ++t) rank += shared.tile[t] > place;
    __syncthreads();  // the tile is read
  }
  if (src >= sets.num_src) return;
  int64_t* row_of = args.dst_idx + batch_idx * args.num_tokens + 2 * src;
  const int64_t num_unmerged = sets.num_src - args.r;
  write_unmatched(args, sets, batch_idx, src);
  if (src < sets.num_dst) row_of[1] = num_unmerged + src;
  if (!candidate) {
    row_of[0] = n - args.r + src;  // the first tokens come after all candidates
    return;
  }
  const SourceMatch found = combine(args, sets, batch_idx, num_splits, own, first_free);
  args.match_idx[batch_idx * args.num_tokens + 2 * src] = found.token;
  args.score[batch_idx * args.num_tokens + 2 * src] = found.score;
  row_of[0] = rank < args.r ? num_unmerged + found.token / 2 : rank - args.r;
}

}  // namespace
}  // namespace tokred
