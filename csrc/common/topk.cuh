// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Exact, order-preserving top-k of one row by a team, a block or a warp: the selection that common/topk.h makes on the
// CPU.
//
// The k-th largest key is searched two bits at a time: each round counts how many keys reach three pivots. 16 rounds of
// one barrier each (none for a warp), whatever the keys are: softmax scores that share their leading bits, ties and
// constant rows cost what random ones do, and there is no histogram for atomics to fight over. The kept tokens are then
// numbered by votes in index order, so that ordering costs nothing.
#pragma once

#include "common/block.cuh"
#include "common/score_key.h"

namespace tokred {

struct BlockTopkScratch {
  int partial[2][3][kWarpSize];  // counts per warp; two sets, so that a sum needs one barrier
  BlockScratch block;
};

// A team's functions are called by all its threads. Sums and scans are valid in each of them.
struct WarpTeam {
  __device__ int rank() const { return lane_index(); }
  __device__ int size() const { return kWarpSize; }
  __device__ int warp() const { return 0; }
  __device__ void sync() const { __syncwarp(); }
  __device__ void sum(int (&value)[3]) const {
#pragma unroll
    for (int& v : value) v = warp_sum(v);
  }
  // The sum of the values of the warps before this one; value is the same in all lanes of a warp.
  __device__ unsigned scan_warps(unsigned value, unsigned* total) const {
    *total = value;
    return 0;
  }
};

// A whole block, of one dimension; one object per scratch and kernel, since it remembers which set of counts is free.
class BlockTeam {
 public:
  __device__ explicit BlockTeam(BlockTopkScratch& scratch) : scratch_(scratch) {}
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ int warp() const { return warp_index(); }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sum(int (&value)[3]) {
    const int num_warps = size() / kWarpSize, lane = lane_index();
    auto& partial = scratch_.partial[set_];
    set_ ^= 1;
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      const int of_warp = warp_sum(value[p]);
      if (lane == 0) partial[p][warp()] = of_warp;
    }
    __syncthreads();  // this set is written; the readers of the other one passed the barrier before
#pragma unroll
    for (int p = 0; p < 3; ++p) value[p] = warp_sum(lane < num_warps ? partial[p][lane] : 0);
  }
  __device__ unsigned scan_warps(unsigned value, unsigned* total) const {
    return block_exclusive_scan_of_warps(value, scratch_.block, total);
  }

 private:
  BlockTopkScratch& scratch_;
  int set_ = 0;
};

// Keys in registers: each warp of the team holds kItems * 32 consecutive ones.
template <int kItems>
struct RegisterKeys {
  int first;  // token of item 0
  uint32_t key[kItems];

  __device__ int token(int item) const { return first + item * kWarpSize; }
  template <typename F>
  __device__ void for_each(F&& f) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) f(key[i]);
  }
};

// key_at(token) is called for token < n only; keys beyond are excluded.
template <int kItems, typename Team, typename KeyAt>
__device__ inline RegisterKeys<kItems> register_keys(const Team& team, int n, KeyAt&& key_at) {
  RegisterKeys<kItems> keys;
  keys.first = team.warp() * kItems * kWarpSize + lane_index();
#pragma unroll
  for (int i = 0; i < kItems; ++i) keys.key[i] = keys.token(i) < n ? key_at(keys.token(i)) : kKeyExcluded;
  return keys;
}

// Keys read anew in each round by a block, for rows that registers do not hold. key_at(token) is called for token < n
// only, always by thread token % blockDim.x.
template <typename KeyAt>
struct StreamKeys {
  KeyAt key_at;
  int n;

  template <typename F>
  __device__ void for_each(F&& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) f(key_at(i));
  }
};

// Taken: every key above bound, and the first num_ties keys equal to it.
struct TopkBound {
  uint32_t bound;
  int num_ties;
};

// 0 <= k <= number of keys.
template <typename Keys, typename Team>
__device__ inline TopkBound topk_bound(const Keys& keys, int k, Team& team) {
  uint32_t bound = 0;   // at least k keys reach it
  int count_above = 0;  // keys that reach the lowest pivot known to be too high
  for (int shift = 30; shift >= 0; shift -= 2) {
    const uint32_t step = 1u << shift;
    int count[3] = {0, 0, 0};
    keys.for_each([&](uint32_t key) {
#pragma unroll
      for (uint32_t p = 0; p < 3; ++p) count[p] += key >= bound + (p + 1) * step;
    });
    team.sum(count);
    int digit = 0, reached = 0;
#pragma unroll
    for (int p = 2; p >= 0; --p) {
      if (digit == 0) {
        if (count[p] >= k) {
          digit = p + 1;
          reached = count[p];
        } else {
          count_above = count[p];
        }
      }
    }
    bound += static_cast<uint32_t>(digit) * step;
    if (digit > 0 && reached == k) return {bound, k};  // exactly the wanted keys reach it: ties are all taken
  }
  return {bound, k - count_above};
}

struct TopkSeen {
  int above = 0, ties = 0;
};

// f(token, key, taken_before, taken) for each key of a tile; seen counts the tiles before it, and then this one.
template <int kItems, typename Team, typename F>
__device__ inline void topk_visit_tile(const RegisterKeys<kItems>& keys, TopkBound bound, Team& team, TopkSeen& seen,
                                       F&& f) {
  unsigned counts = 0, total;  // above and tied in one word: a tile has at most 32,768 keys
  keys.for_each([&](uint32_t key) {
    counts += static_cast<unsigned>(__popc(__ballot_sync(kFullMask, key > bound.bound))) << 16;
    counts += static_cast<unsigned>(__popc(__ballot_sync(kFullMask, key == bound.bound)));
  });
  const unsigned before = team.scan_warps(counts, &total);
  TopkSeen at{seen.above + static_cast<int>(before >> 16), seen.ties + static_cast<int>(before & 0xffffu)};
  const unsigned lanes_below = (1u << lane_index()) - 1;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool is_above = keys.key[i] > bound.bound, is_tied = keys.key[i] == bound.bound;
    const unsigned above = __ballot_sync(kFullMask, is_above), tied = __ballot_sync(kFullMask, is_tied);
    const int ties_before = at.ties + __popc(tied & lanes_below);
    f(keys.token(i), keys.key[i], at.above + __popc(above & lanes_below) + min(ties_before, bound.num_ties),
      is_above || (is_tied && ties_before < bound.num_ties));
    at.above += __popc(above);
    at.ties += __popc(tied);
  }
  seen.above += static_cast<int>(total >> 16);
  seen.ties += static_cast<int>(total & 0xffffu);
}

// f(token, key, taken_before, taken) for every key, each token in one thread; tokens past the row are visited, too, and
// not taken while keys in the row are left to take. Returns how many were taken.
template <int kItems, typename Team, typename F>
__device__ inline int topk_visit(const RegisterKeys<kItems>& keys, TopkBound bound, Team& team, F&& f) {
  TopkSeen seen;
  topk_visit_tile(keys, bound, team, seen, f);
  return seen.above + min(seen.ties, bound.num_ties);
}
template <typename KeyAt, typename Team, typename F>
__device__ inline int topk_visit(const StreamKeys<KeyAt>& keys, TopkBound bound, Team& team, F&& f) {
  TopkSeen seen;
  for (int tile = 0; tile < keys.n; tile += team.size()) {
    const int token = tile + team.rank();
    const RegisterKeys<1> one{token, {token < keys.n ? keys.key_at(token) : kKeyExcluded}};
    topk_visit_tile(one, bound, team, seen, f);
  }
  return seen.above + min(seen.ties, bound.num_ties);
}

// Writes the taken tokens in order: emit(slot, token). Returns how many were taken.
template <typename Keys, typename Team, typename Emit>
__device__ inline int topk_emit(const Keys& keys, int k, Team& team, Emit&& emit) {
  return topk_visit(keys, topk_bound(keys, k, team), team, [&](int token, uint32_t, int taken_before, bool taken) {
    if (taken) emit(taken_before, token);
  });
}

}  // namespace tokred
