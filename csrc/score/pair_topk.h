// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/pair.h"

namespace tokred {

struct PairTopkArgs {
  PairInputs in;
  const float* bias;  // a value per row of y, added to its similarities; null: none
  float* value;       // [total_x, k]
  int64_t* idx;       // [total_x, k]
  uint64_t* partial;  // CUDA only: pair_topk_partial_size values
  int64_t k;
};

constexpr int kPairPassK = 32;  // of a pass: one per lane. Longer lists take several passes
constexpr int kPairMergeThreads = 256;

struct PairTopkPolicy {
  bool vector_loads;  // 16 bytes at a time; else one value
  int64_t x_blocks;
  int num_splits;  // shares of y, one block each; no bit of the result depends on it
  int passes;
  int merge_warps;  // of an output row
};
inline PairTopkPolicy choose_policy(const PairTopkArgs& a) {
  const PairInputs& in = a.in;
  const int64_t x_blocks = pair_x_blocks(in);
  const int64_t num_y = in.cu_y ? in.num_y / std::max<int64_t>(in.batch_size, 1) : in.num_y;
  int64_t splits = 1;
  if (x_blocks >
      0) {  // nearest: about four blocks for each of 132 SMs, their unequal ends then cost little; lists: two
    splits = std::min(ceil_div(num_y, int64_t{kPairBlockY}), ceil_div(int64_t{(a.k == 1 ? 4 : 2) * 132}, x_blocks));
    splits = std::max<int64_t>(splits, 1);
  }
  return {pair_vector_loads(in), x_blocks, static_cast<int>(splits),
          static_cast<int>(ceil_div(a.k, int64_t{kPairPassK})), splits > 8 ? kPairMergeThreads / 32 : 1};
}
// Where there is but one share, its results wait in idx.
inline int64_t pair_topk_partial_size(const PairTopkArgs& a, const PairTopkPolicy& policy) {
  return policy.num_splits == 1 ? 0 : policy.num_splits * a.in.total_x() * std::min<int64_t>(a.k, kPairPassK);
}

void pair_topk_cpu(const PairTopkArgs& args);
int pair_topk_cuda(const PairTopkArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
