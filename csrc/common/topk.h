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
  explicit TopkScratch(int64_t max_tokens)
      : keys(max_tokens + 64), survivors(max_tokens + 64), survivor_idx(max_tokens + 64) {}
  AlignedBuffer<int32_t> keys;
  AlignedBuffer<int32_t> survivors;
  AlignedBuffer<int32_t> survivor_idx;
};

// Writes the keys of n scores to scratch.keys. keep / drop: one byte per token or null. Excluded tokens get
// kKeyExcluded; forced ones kKeyForced, or, where more than k are forced, keep their rank and exclude all others.
// Returns how many tokens are eligible (not excluded).
template <typename T>
int64_t make_keys(const T* score, int64_t stride, const uint8_t* keep, const uint8_t* drop, int64_t n, int64_t k,
                  TopkScratch& scratch);

// The positions of the k largest of scratch.keys[0, n), ties to the lowest position, ascending, to out, which needs room
// for k + 16. Excluded tokens are never taken: returns how many were written, min(k, eligible).
int64_t topk_ascending(int64_t n, int64_t k, int64_t eligible, int32_t* out, TopkScratch& scratch);

}  // namespace tokred
