// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include <cmath>

#include "common/pair.h"

namespace tokred {

enum class PairFunction : int8_t { kMean, kSum, kCountAbove, kSoftmaxMean, kEluMargin, kGauss };

struct PairReduceArgs {
  PairInputs in;
  float* out;       // [total_x]
  double* partial;  // pair_reduce_partial_size values: what each share of y has summed
  float param;      // threshold, temperature, margin or sigma
  PairFunction function;
};

// What a share has found for a row: sums of f and counts; with softmax, the largest logit, and sums of weights and of
// weighted similarities relative to it.
constexpr int kPairReduceState = 3;

// Shares follow from the sequence alone, so that its bits do not depend on its batch: at most 32, of 2,048 rows or
// more.
constexpr int kPairMaxShares = 32;
TOKRED_HOST_DEVICE int64_t pair_share_rows(int64_t num_y) {
  const int64_t rows = ceil_div(num_y, int64_t{kPairMaxShares});
  return ceil_div(rows < 2048 ? int64_t{2048} : rows, int64_t{kPairBlockY}) * kPairBlockY;
}
TOKRED_HOST_DEVICE int64_t pair_num_shares(int64_t num_y) { return ceil_div(num_y, pair_share_rows(num_y)); }

constexpr int kPairFinishThreads = 256;

struct PairReducePolicy {
  bool vector_loads;  // 16 bytes at a time; else one value
  int64_t x_blocks;
  int num_shares;  // of the longest sequence; others have no more
};
inline PairReducePolicy choose_policy(const PairReduceArgs& a) {
  return {pair_vector_loads(a.in), pair_x_blocks(a.in),
          static_cast<int>(std::max<int64_t>(pair_num_shares(a.in.num_y), 1))};
}
inline int64_t pair_reduce_partial_size(const PairReduceArgs& a) {
  return choose_policy(a).num_shares * a.in.total_x() * kPairReduceState;
}

// The result of a row from its shares, in their order; get(share, i) is value i of a share's state. No row met: 0.
template <typename Get>
TOKRED_HOST_DEVICE float pair_finish(PairFunction function, int64_t num_shares, const Get& get) {
  if (function == PairFunction::kSoftmaxMean) {
    double largest = -INFINITY, weight = 0, sum = 0;
    for (int64_t share = 0; share < num_shares; ++share) largest = get(share, 0) > largest ? get(share, 0) : largest;
    for (int64_t share = 0; share < num_shares; ++share) {
      if (get(share, 1) == 0) continue;  // nobody met; a NaN goes on
      const double scale = exp(get(share, 0) - largest);
      weight += get(share, 1) * scale;
      sum += get(share, 2) * scale;
    }
    return weight == 0 ? 0.f : static_cast<float>(sum / weight);
  }
  double sum = 0, count = 0;
  for (int64_t share = 0; share < num_shares; ++share) {
    sum += get(share, 0);
    count += get(share, 1);
  }
  const bool mean = function != PairFunction::kSum && function != PairFunction::kCountAbove;
  return static_cast<float>(mean && count > 0 ? sum / count : sum);
}

void pair_reduce_cpu(const PairReduceArgs& args);
int pair_reduce_cuda(const PairReduceArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
