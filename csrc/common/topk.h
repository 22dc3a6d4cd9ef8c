// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Exact, order-preserving top-k on the CPU. Ranks are score_key values (common/score_key.h).
#pragma once
#include <cstdint>

#include "common/parallel.h"
#include "common/score_key.h"
#include "common/topk_rows.h"

namespace tokred {

// Scratch of one thread for rows of up to max_tokens.
struct TopkScratch {
  explicit TopkScratch(int64_t max_tokens)
      : keys(max_tokens + 64), positions(max_tokens + 64), spare(max_tokens + 64) {}
  AlignedBuffer<int32_t> keys;       // of the tokens still in play
  AlignedBuffer<int32_t> positions;  // theirs
  AlignedBuffer<int32_t> spare;      // of the keys among which the k-th is
};

// The positions of the k best tokens of the row, ties to the lowest position, ascending, to out, which needs room for
// min(k, num_tokens) + 16. Excluded tokens are never taken; forced ones come first, and where more than k are forced
// the k best-ranked of them are taken. Returns how many were written, min(k, eligible tokens).
template <typename T>
int64_t topk_ascending(const TopkRow<T>& row, int64_t k, int32_t* out, TopkScratch& scratch);

// The positions of [0, num_tokens) that are not among the ascending kept ones, ascending, to scratch.positions. Returns
// how many there are.
int64_t topk_rest(const int32_t* kept, int64_t count, int64_t num_tokens, TopkScratch& scratch);

// Sorts positions of the row, ascending on entry, by falling score, ties to the lowest position.
template <typename T>
void sort_by_score(const TopkRow<T>& row, int32_t* positions, int64_t count);

}  // namespace tokred
