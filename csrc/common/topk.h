// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Exact, order-preserving top-k on the CPU. Ranks are score_key values (common/score_key.h).
#pragma once
#include <cstdint>

#include "common/parallel.h"
#include "common/score_key.h"

namespace tokred {

// Scratch of one thread for rows of up to max_tokens.
struct TopkScratch {
  explicit TopkScratch(int64_t max_tokens) : keys(max_tokens + 64), positions(max_tokens + 64) {}
  AlignedBuffer<int32_t> keys;       // of the tokens still in play
  AlignedBuffer<int32_t> positions;  // theirs
};

// One row of a selection. keep / drop: one byte per token, or null.
template <typename T>
struct TopkRow {
  const T* score;
  int64_t stride;  // of score, in elements
  const uint8_t* keep;
  const uint8_t* drop;
  int64_t num_tokens;
};

// The positions of the k best tokens of the row, ties to the lowest position, ascending, to out, which needs room for
// min(k, num_tokens) + 16. Tokens marked in drop are never taken; those marked in keep come first, and where more than
// k are marked the k best-ranked of them are taken. Returns how many were written, min(k, eligible tokens).
template <typename T>
int64_t topk_ascending(const TopkRow<T>& row, int64_t k, int32_t* out, TopkScratch& scratch);

}  // namespace tokred
