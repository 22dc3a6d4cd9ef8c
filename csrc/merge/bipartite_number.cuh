// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// bipartite_match's second launch: combines what the blocks of the first have found, ranks the sources and numbers the
// output rows. Included by bipartite_match.cu alone.
#pragma once
#include "common/topk.cuh"
#include "merge/bipartite_match.h"

namespace tokred {
namespace {

// The first slot of a destination that a source of the row may take, -1: there is none; valid in every thread.
__device__ inline int block_first_free(const BipartiteMatchArgs& args, const BipartiteRow& row, BlockScratch& scratch) {
  if (!args.protect && !args.destination.token.data) return row.num_dst > 0 ? 0 : -1;
  int free = row.num_dst, any = row.num_dst;
  for (int j = static_cast<int>(threadIdx.x); j < row.num_dst; j += static_cast<int>(blockDim.x)) {
    const int64_t token = destination_token(args, row, j);
    if (token < 0) continue;
    any = min(any, j);
    if (!args.protect || !args.protect[row.batch_idx * args.num_tokens + token]) free = min(free, j);
  }
  free = block_min(free, scratch);
  any = block_min(any, scratch);
  // Where a count is kept whatever the mask says, protected destinations are taken when no other is left.
  const int first = free < row.num_dst || args.ragged ? free : any;
  return first < row.num_dst ? first : -1;
}

// What the shares have found for the source in slot i.
struct SourceMatch {
  uint32_t key;  // its place in the order of merging
  float score;
  int64_t token;  // of the destination, -1: there is none
};
__device__ inline SourceMatch combine(const BipartiteMatchArgs& args, const BipartiteRow& row, int num_splits, int i,
                                      int64_t token, int num_slots, int first_free) {
  const float lowest = -__uint_as_float(0x7f800000u);
  if (token < 0 || first_free < 0) return {kMatchEmpty, lowest, -1};
  const int64_t at = row.batch_idx * args.num_tokens + token;
  unsigned long long packed = 0;
  for (int split = 0; split < num_splits; ++split) {
    const int64_t share = (split * args.batch_size + row.batch_idx) * num_slots + i;
    packed = max(packed, static_cast<unsigned long long>(args.partial[share]));
  }
  const uint32_t best = static_cast<uint32_t>(packed >> 32);
  const int j = packed ? static_cast<int>(0xffffffffu - static_cast<uint32_t>(packed)) : first_free;
  float score = packed ? __uint_as_float(best >> 31 ? best ^ 0x80000000u : ~best) : __uint_as_float(0x7fc00000u);
  if (args.weight) score *= args.weight[at];
  const bool blocked = (args.protect && args.protect[at]) || (args.group && !packed);
  return {blocked ? kMatchBlocked : match_key(score), blocked ? lowest : score, destination_token(args, row, j)};
}

struct NumberStorage {
  BlockTopkScratch topk;
};

// What stands in dst_idx while a row is numbered; the order of the output rows follows from it.
constexpr int64_t kRoleOther = 0, kRoleAbsent = -1, kRoleDestination = -2, kRoleMerged = -3, kRoleRanked = -4;

// Gives every token its row, but those that are merged or ranked by score: one block per row. num_kept tokens have
// rows, the destinations, if they are apart, the last ones; others start at first_other.
__device__ inline void block_number(int64_t* row_of, int64_t len, bool by_index, int64_t first_other, int64_t first_dst,
                                    BlockScratch& scratch) {
  int64_t others = first_other, destinations = first_dst;
  for (int64_t tile = 0; tile < len; tile += blockDim.x) {
    const int64_t token = tile + threadIdx.x;
    const int64_t role = token < len ? row_of[token] : kRoleAbsent;
    const bool apart = role == kRoleDestination && !by_index,
               other = role == kRoleOther || (role == kRoleDestination && by_index);
    // Both counts in one word: a tile has at most 1,024 tokens.
    unsigned total = 0;
    const unsigned before = block_exclusive_scan(other + (unsigned{apart} << 16), scratch, &total);
    if (other) row_of[token] = others + (before & 0xffffu);
    if (apart) row_of[token] = destinations + (before >> 16);
    others += total & 0xffffu;
    destinations += total >> 16;
  }
}

// One block per row selects the sources that merge and numbers the output rows; with order "score" the rank of sources
// that do not merge is left to bipartite_rank_kernel, with their places in partial, 0 for the others. kItems keys of
// each thread stay in registers; 0: they are read again.
template <int kItems>
__global__ void __launch_bounds__(kBipartiteNumberThreads, 1)
    bipartite_number_kernel(const BipartiteMatchArgs args, int num_splits, int num_slots) {
  TOKRED_SHARED(NumberStorage, shared);
  const BipartiteRow row = bipartite_row(args, blockIdx.x);
  const int n = row.num_src, threads = static_cast<int>(blockDim.x);
  int64_t* match_idx = args.match_idx + row.batch_idx * args.num_tokens;
  float* score = args.score + row.batch_idx * args.num_tokens;
  int64_t* row_of = args.dst_idx + row.batch_idx * args.num_tokens;
  uint64_t* place = args.partial + row.batch_idx * num_slots;
  const bool by_index = args.order == MatchOrder::kIndex, by_score = args.order == MatchOrder::kScore;
  const bool listed = args.destination.token.data != nullptr;

  for (int64_t token = threadIdx.x; token < args.num_tokens; token += threads) {
    match_idx[token] = -1;
    score[token] = -__uint_as_float(0x7f800000u);
    row_of[token] = token >= row.len ? kRoleAbsent : !listed && token % 2 ? kRoleDestination : kRoleOther;
  }
  const int first_free = block_first_free(args, row, shared.topk.block);
  __syncthreads();  // the roles of all tokens are written
  int num_dst = static_cast<int>(row.len / 2);
  if (listed) {
    int listed_here = 0;
    for (int j = static_cast<int>(threadIdx.x); j < row.num_dst; j += threads) {
      const int64_t token = destination_token(args, row, j);
      if (token < 0) continue;
      row_of[token] = kRoleDestination;
      ++listed_here;
    }
    num_dst = block_sum(listed_here, shared.topk.block);
  }

  BlockTeam team(shared.topk);
  const uint32_t lowest = lowest_match_key(args, row.batch_idx);
  const auto match = [&](int i) {
    const int64_t token = source_token(args, row, i);
    const SourceMatch found = combine(args, row, num_splits, i, token, num_slots, first_free);
    if (token >= 0) {
      match_idx[token] = found.token;
      score[token] = found.score;
    }
    // Larger is earlier: the key, then the lower slot. Unique, and 0 for an empty slot only.
    place[i] = token >= 0 ? uint64_t{found.key} << 32 | (0xffffffffu - static_cast<unsigned>(i)) : 0;
    return found.key;
  };
  int num_merged = 0, num_sources = 0;
  const auto number = [&](const auto& keys) {
    int count[3] = {0, 0, 0};
    keys.for_each([&](uint32_t key) { count[0] += key >= lowest; });
    for (int i = static_cast<int>(threadIdx.x); i < n; i += threads) count[1] += source_token(args, row, i) >= 0;
    team.sum(count);
    num_merged = static_cast<int>(min(args.r, int64_t{count[0]}));
    num_sources = count[1];
    const TopkBound bound = topk_bound(keys, num_merged, team);
    topk_visit(keys, bound, team, [&](int i, uint32_t, int, bool merged) {
      const int64_t token = i < n ? source_token(args, row, i) : -1;
      if (token < 0) return;
      if (merged) row_of[token] = kRoleMerged;
      if (by_score && !merged) row_of[token] = kRoleRanked;
    });
  };
  if constexpr (kItems > 0) {
    number(register_keys<kItems>(team, n, match));
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += threads) match(i);
    const auto key_at = [&](int i) { return static_cast<uint32_t>(place[i] >> 32); };  // by the thread that wrote it
    number(StreamKeys<decltype(key_at)>{key_at, n});
  }
  __syncthreads();  // the roles of all sources are written
  const int64_t kept = row.len - num_merged;
  if (threadIdx.x == 0 && args.num_kept) args.num_kept[row.batch_idx] = static_cast<int32_t>(kept);
  block_number(row_of, row.len, by_index, by_score ? num_sources - num_merged : 0, kept - num_dst, shared.topk.block);
  __syncthreads();  // the rows of all destinations are written
  for (int i = static_cast<int>(threadIdx.x); i < n; i += threads) {
    const int64_t token = source_token(args, row, i);
    if (token < 0 || row_of[token] != kRoleMerged) continue;
    row_of[token] = row_of[match_idx[token]];
    place[i] = 0;
  }
}

struct RankStorage {
  unsigned long long tile[kBipartiteRankThreads];
};

// Order "score": the row of a source that does not merge is the number of such sources before it, counted by comparing
// it with all: quadratic, but spread over all SMs and a fraction of the matching's own quadratic work. grid: batch_size
// * blocks of sources.
__global__ void __launch_bounds__(kBipartiteRankThreads)
    bipartite_rank_kernel(const BipartiteMatchArgs args, int num_slots) {
  TOKRED_SHARED(RankStorage, shared);
  const int num_blocks = ceil_div(num_slots, kBipartiteRankThreads);
  const BipartiteRow row = bipartite_row(args, blockIdx.x / static_cast<unsigned>(num_blocks));
  const int slot = static_cast<int>(blockIdx.x) % num_blocks * kBipartiteRankThreads + static_cast<int>(threadIdx.x);
  const uint64_t* place = args.partial + row.batch_idx * num_slots;
  const unsigned long long own = slot < row.num_src ? place[slot] : 0;
  int rank = 0;
  for (int begin = 0; begin < row.num_src; begin += kBipartiteRankThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    shared.tile[threadIdx.x] = i < row.num_src ? place[i] : 0;
    __syncthreads();  // the tile is whole
#pragma unroll 8
    for (int t = 0; t < kBipartiteRankThreads; ++t) rank += shared.tile[t] > own;
    __syncthreads();  // the tile is read
  }
  if (own != 0) args.dst_idx[row.batch_idx * args.num_tokens + source_token(args, row, slot)] = rank;
}

}  // namespace
}  // namespace tokred
