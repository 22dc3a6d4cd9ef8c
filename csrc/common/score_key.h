// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// The one order of scores, shared by every device: a float's place in it as an unsigned integer.
#pragma once
#include <cstring>

#include "common/dispatch.h"

namespace tokred {

// Excluded tokens rank below everything, then NaN, then -inf .. +inf; forced tokens rank above +inf.
constexpr uint32_t kKeyExcluded = 0;
constexpr uint32_t kKeyNaN = 1;
constexpr uint32_t kKeyForced = 0xffffffffu;

// Increases with the score; -0.0 and 0.0 share a key, every NaN has the same one. Integer arithmetic only, so that a
// flush-denormals mode cannot change the order.
TOKRED_HOST_DEVICE uint32_t score_key(float score) {
  uint32_t bits;
#if defined(__CUDA_ARCH__)
  bits = __float_as_uint(score);
#else
  std::memcpy(&bits, &score, sizeof(bits));
#endif
  if ((bits & 0x7fffffffu) > 0x7f800000u) return kKeyNaN;
  if (bits == 0x80000000u) bits = 0;
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

// The inverse of score_key, for the key of a number; some NaN for that of NaN.
TOKRED_HOST_DEVICE float key_score(uint32_t key) {
  const uint32_t bits = key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu);
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

}  // namespace tokred
