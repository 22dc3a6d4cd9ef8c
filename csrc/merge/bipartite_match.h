// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"

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
  TOKRED_HOST_DEVICE int64_t candidate_src() const { return num_src - first_src; }
  TOKRED_HOST_DEVICE int64_t candidate_dst() const { return num_dst - first_dst; }
};
TOKRED_HOST_DEVICE BipartiteSets bipartite_sets(int64_t num_tokens, int64_t num_protected) {
  return {(num_tokens + 1) / 2, num_tokens / 2, (num_protected + 1) / 2, num_protected / 2};
}

// The CPU's tile of similarities, src_rows x dst_rows, out of num_tokens alone: a row's bits do not depend on its batch.
// At most 256 x 512 (a tile and its operands stay in a 2 MiB L2 cache up to a dim of 512), split evenly so that 289
// sources do not pay for 512.
struct BipartiteMatchTile {
  int64_t src_rows, dst_rows;
};
constexpr int64_t bipartite_even_tile(int64_t count, int64_t largest) {
  const int64_t tiles = count < 1 ? 1 : ceil_div(count, largest);
  return ceil_div(ceil_div(count < 1 ? int64_t{1} : count, tiles), int64_t{16}) * 16;
}
constexpr BipartiteMatchTile bipartite_match_tile(const BipartiteSets& sets) {
  return {bipartite_even_tile(sets.num_src, 256), bipartite_even_tile(sets.num_dst, 512)};
}

void bipartite_match_cpu(const BipartiteMatchArgs& args);
int bipartite_match_cuda(const BipartiteMatchArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
