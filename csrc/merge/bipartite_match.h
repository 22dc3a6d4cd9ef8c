// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"
#include "common/pair_tiles.h"

namespace tokred {

enum class MatchOrder : int8_t { kIndex, kGrouped, kScore };

// Source i is token 2 i, destination j is token 2 j + 1. Candidates are the sources and destinations that the first
// num_protected tokens leave; protect only ranks among candidates.
struct BipartiteMatchArgs {
  const void* metric;      // [batch_size, num_tokens, dim], last dim contiguous
  const uint8_t* protect;  // [batch_size, num_tokens], contiguous, 0 or 1; null: none
  int64_t* dst_idx;        // [batch_size, num_tokens]
  int64_t* match_idx;      // [batch_size, num_tokens], -1 where a token has no match
  float* score;            // [batch_size, num_tokens], -inf where a token may not merge
  uint64_t* partial;       // CUDA only: [num_splits, batch_size, num_sources]; may be null elsewhere
  int64_t batch_size, num_tokens, dim;
  int64_t stride_batch, stride_token;  // of metric, in elements
  int64_t r, num_protected;            // 0 <= r <= number of candidate sources
  float eps;
  bool normalize;
  MatchOrder order;
  DType dtype;  // of metric
};

// The counts that follow from num_tokens and num_protected.
struct BipartiteSets {
  int64_t num_src, num_dst;      // tokens at even and at odd positions
  int64_t first_src, first_dst;  // the first candidates
  TOKRED_HOST_DEVICE constexpr int64_t candidate_src() const { return num_src - first_src; }
  TOKRED_HOST_DEVICE constexpr int64_t candidate_dst() const { return num_dst - first_dst; }
};
TOKRED_HOST_DEVICE constexpr BipartiteSets bipartite_sets(int64_t num_tokens, int64_t num_protected) {
  return {(num_tokens + 1) / 2, num_tokens / 2, (num_protected + 1) / 2, num_protected / 2};
}

constexpr int kBipartiteBlockSrc = 64, kBipartiteBlockDst = 128;  // of a CUDA block's tile
constexpr int kBipartiteMaxSplits = 8;
constexpr int kBipartiteNumberThreads = 1024, kBipartiteRankThreads = 256;  // at most, and exactly

struct BipartiteMatchPolicy {
  bool vector_loads;                 // 16 bytes at a time; else one value
  int num_splits;                    // shares of the destinations, one block each; no bit of the result depends on it
  int64_t match_blocks;              // 0: nothing to match
  int number_threads, number_items;  // of the block that numbers a row; keys per thread in registers, 0: none
};
constexpr BipartiteMatchPolicy choose_policy(const BipartiteMatchArgs& a, uint64_t address) {
  const BipartiteSets sets = bipartite_sets(a.num_tokens, a.num_protected);
  const int64_t rows = a.batch_size * ceil_div(sets.candidate_src(), int64_t{kBipartiteBlockSrc});
  const int64_t tiles = ceil_div(sets.candidate_dst(), int64_t{kBipartiteBlockDst});
  int64_t splits = 1;
  if (rows > 0 && tiles > 0) {  // about four blocks for each of 132 SMs: their unequal ends then cost little
    splits = std::min({tiles, int64_t{kBipartiteMaxSplits}, ceil_div(int64_t{4 * 132}, rows)});
  }
  const int64_t n = sets.candidate_src();
  const int items = n <= kBipartiteNumberThreads ? 1 : n <= 4 * kBipartiteNumberThreads ? 4 : 0;
  const int64_t threads = items == 1 ? std::max<int64_t>(ceil_div(n, int64_t{32}) * 32, 128) : kBipartiteNumberThreads;
  return {rows_are_aligned(address, a.dtype, a.dim, a.stride_token, a.batch_size, a.stride_batch),
          static_cast<int>(splits), tiles > 0 ? rows * splits : 0, static_cast<int>(threads), items};
}

void bipartite_match_cpu(const BipartiteMatchArgs& args);
int bipartite_match_cuda(const BipartiteMatchArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
