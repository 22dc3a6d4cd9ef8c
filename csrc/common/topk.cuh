// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Exact, order-preserving top-k of one row by one block: the same selection as common/topk.h makes on the CPU.
//
// The k-th largest key is searched two bits at a time: each round counts how many keys reach three pivots. 16 rounds of
// one barrier each, whatever the keys are: softmax scores that share their leading bits, ties and constant rows cost
// what random ones do, and there is no histogram for atomics to fight over. The kept tokens are then written by a
// prefix sum in index order, so that ordering costs nothing.
#pragma once

#include "common/block.cuh"
#include "common/score_key.h"

namespace tokred {

struct BlockTopkScratch {
  int partial[2][3][kWarpSize];  // counts per warp; two sets, so that a round needs one barrier
  BlockScratch block;
};

// A row's keys in registers: item i of thread t is token i * blockDim.x + t; tokens past the row are excluded.
template <int kItems>
struct RegisterKeys {
  uint32_t key[kItems];

  template <typename F>
  __device__ void for_each(F&& f) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) f(key[i]);
  }
  // f(token, key) for whole tiles of blockDim.x tokens, in order; all threads take part in each.
  template <typename F>
  __device__ void for_each_tile(F&& f) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) f(i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x), key[i]);
  }
};

// Keys read anew in each round, for rows that registers do not hold. key_at(token) is called for token < n only.
template <typename KeyAt>
struct StreamKeys {
  KeyAt key_at;
  int n;

  template <typename F>
  __device__ void for_each(F&& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) f(key_at(i));
  }
  template <typename F>
  __device__ void for_each_tile(F&& f) const {
    for (int tile = 0; tile < n; tile += static_cast<int>(blockDim.x)) {
      const int token = tile + static_cast<int>(threadIdx.x);
      f(token, token < n ? key_at(token) : kKeyExcluded);
    }
  }
};

// Taken: every key above bound, and the first num_ties keys equal to it.
struct TopkBound {
  uint32_t bound;
  int num_ties;
};

// Called by all threads of the block; 0 <= k <= number of keys. Valid in every thread.
template <typename Keys>
__device__ inline TopkBound block_topk_bound(const Keys& keys, int k, BlockTopkScratch& scratch) {
  const int num_warps = num_threads_in_block() / kWarpSize, lane = lane_index(), warp = warp_index();
  uint32_t bound = 0;   // at least k keys reach it
  int count_above = 0;  // keys that reach the lowest pivot known to be too high
  for (int shift = 30, set = 0; shift >= 0; shift -= 2, set ^= 1) {
    const uint32_t step = 1u << shift;
    int count[3] = {0, 0, 0};
    keys.for_each([&](uint32_t key) {
#pragma unroll
      for (uint32_t p = 0; p < 3; ++p) count[p] += key >= bound + (p + 1) * step;
    });
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      count[p] = warp_sum(count[p]);
      if (lane == 0) scratch.partial[set][p][warp] = count[p];
    }
    __syncthreads();  // this round's counts are written; the other set's readers passed the barrier before
    int digit = 0, reached = 0;
#pragma unroll
    for (int p = 2; p >= 0; --p) {
      const int total = warp_sum(lane < num_warps ? scratch.partial[set][p][lane] : 0);
      if (digit == 0) {
        if (total >= k) {
          digit = p + 1;
          reached = total;
        } else {
          count_above = total;
        }
      }
    }
    bound += static_cast<uint32_t>(digit) * step;
    if (digit > 0 && reached == k) {  // exactly the wanted keys reach it: ties of the bound are all taken
      __syncthreads();                // the counts are read before the caller reuses the scratch
      return {bound, k};
    }
  }
  __syncthreads();  // as above
  return {bound, k - count_above};
}

// Writes the taken tokens in order: emit(slot, token). Called by all threads of the block. Returns how many were taken.
template <typename Keys, typename Emit>
__device__ inline int block_topk_emit(const Keys& keys, TopkBound bound, BlockTopkScratch& scratch, Emit&& emit) {
  int slots = 0, ties = 0;  // taken and tied so far, in the tiles before this one
  keys.for_each_tile([&](int token, uint32_t key) {
    const int above = key > bound.bound, tied = key == bound.bound;
    // One scan for both: a tile has at most 1024 tokens.
    int total;
    const int before = block_exclusive_scan((above << 16) | tied, scratch.block, &total);
    const int ties_before = min(ties + (before & 0xffff), bound.num_ties);
    const bool take = above || (tied && ties + (before & 0xffff) < bound.num_ties);
    if (take) emit(slots + (before >> 16) + ties_before - min(ties, bound.num_ties), token);
    slots += (total >> 16) + min(ties + (total & 0xffff), bound.num_ties) - min(ties, bound.num_ties);
    ties += total & 0xffff;
  });
  return slots;
}

}  // namespace tokred
