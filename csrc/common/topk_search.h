// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Vector loops over the keys of a row of scores, and the search of the k-th largest among them. Keys are score_key
// values (common/score_key.h) as signed integers, for which every instruction set has a comparison; they may be read 15
// elements beyond their end.
#pragma once
#include <cstdint>

#include "common/parallel.h"

namespace tokred {

TOKRED_INLINE int32_t signed_key(uint32_t key) { return static_cast<int32_t>(key ^ 0x80000000u); }

// Writes base + i for each keys[i] >= bound, ascending, and the keys themselves if kept_keys is given. Both outputs
// need 16 elements of slack.
using CompactKeys = int64_t (*)(const int32_t* keys, int64_t n, int32_t bound, int32_t base, int32_t* out,
                                int32_t* kept_keys);
extern const CompactKeys compact_keys;

// Positions of the scores that reach a number, ascending; NaN never does. out needs 16 elements of slack.
using ReachingScores = int64_t (*)(const float* score, int64_t n, float bound, int32_t* out);
extern const ReachingScores reaching_scores;

// A bound that count >= k keys reach, and none above it that k do; or one that exactly k reach.
struct KthKey {
  int32_t bound;
  int64_t count;
};

// 1 <= k <= n; spare has room for n keys and 16 more.
KthKey kth_largest(const int32_t* keys, int64_t n, int64_t k, int32_t* spare);

}  // namespace tokred
