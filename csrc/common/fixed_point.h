// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Weights of scores as integers and seeded noise, alike on every device: sums of integers are exact, so that no order
// of additions, no contraction and no library function can change what follows from them.
#pragma once
#include <cmath>

#include "common/score_key.h"

namespace tokred {

// Weights of a row have 40 bits or, where a sum of so many could overflow, fewer.
TOKRED_HOST_DEVICE int weight_shift(int64_t num_tokens) {
  int shift = 0;
  while ((num_tokens >> shift) > (1 << 22)) ++shift;
  return shift;
}

// 2^-(y * 2^-30) in 40 bits, y >= 0: a Taylor polynomial of the fraction, whose error is below one unit of 2^-30.
TOKRED_HOST_DEVICE int64_t exp2_weight(int64_t y) {
  constexpr int64_t kTaylor[] = {1073741824, -744261118, 257941248, -59597083, 10327387, -1431680,
                                 165394,     -16377,     1419,      -109,      8};  // 2^30 (-ln 2)^i / i!
  const int64_t fraction = y & ((1 << 30) - 1);
  int64_t power = kTaylor[10];
  for (int i = 9; i >= 0; --i) power = kTaylor[i] + ((power * fraction) >> 30);
  const int64_t whole = y >> 30;
  return whole < 63 ? (power << 10) >> whole : 0;
}

TOKRED_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
#if defined(__CUDA_ARCH__)
  bits = __float_as_uint(x);
#else
  std::memcpy(&bits, &x, sizeof(bits));
#endif
  return bits;
}

// What a score weighs in a row whose best number is best; 0 for NaN. What weighs anything weighs one unit.
TOKRED_HOST_DEVICE int64_t softmax_weight(float score, float best, double exp2_scale, int shift) {
  if (!(score > -INFINITY)) return 0;
  if (score == best) return (int64_t{1} << 40) >> shift;  // inf - inf
  const double y = (static_cast<double>(best) - static_cast<double>(score)) * exp2_scale;
  const int64_t weight = exp2_weight(y < 0x1p36 ? static_cast<int64_t>(y) : int64_t{1} << 36) >> shift;
  return weight > 0 ? weight : 1;
}
// The score itself in units of 2^-39 of the power of two at or below best; inf counts as 2^128.
TOKRED_HOST_DEVICE int64_t plain_weight(float score, float best, int shift) {
  if (!(score > 0.f)) return 0;
  const uint32_t bits = float_bits(score);
  const int exponent = static_cast<int>(bits >> 23), place = exponent > 0 ? exponent : 1;
  const int top = static_cast<int>(float_bits(best) >> 23);
  const int down = (top > 0 ? top : 1) - place + shift;
  const int64_t mantissa = (bits & 0x7fffffu) | (exponent > 0 ? 0x800000u : 0u);
  const int64_t weight = down < 63 ? (mantissa << 16) >> down : 0;
  return weight > 0 ? weight : 1;
}

// splitmix64.
TOKRED_HOST_DEVICE uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
// Noise of (seed, row, token) alone.
TOKRED_HOST_DEVICE uint64_t noise_bits(uint64_t seed, int64_t row, int64_t token) {
  constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;
  const uint64_t of_row = mix64(seed + kStep * static_cast<uint64_t>(row + 1));
  return mix64(of_row + kStep * static_cast<uint64_t>(token + 1));
}
// In [0, 1), 24 bits.
TOKRED_HOST_DEVICE float uniform_noise(uint64_t seed, int64_t row, int64_t token) {
  return static_cast<float>(static_cast<int32_t>(noise_bits(seed, row, token) >> 40)) * 0x1p-24f;
}
// Exponential noise E in units of 2^-28 bits: of weights w, the largest w / E is drawn with odds w. E is -log2 of a
// uniform number of 33 bits, in 28 bits of fraction found by squaring.
TOKRED_HOST_DEVICE int64_t exponential_noise(uint64_t seed, int64_t row, int64_t token) {
  const uint64_t odd = (noise_bits(seed, row, token) >> 32) * 2 + 1;
  int whole = 0;
  for (int step = 32; step > 0; step /= 2) whole += (odd >> whole >> step) != 0 ? step : 0;
  uint64_t x = whole <= 30 ? odd << (30 - whole) : odd >> (whole - 30);  // in [1, 2), 30 bits of fraction
  int64_t log2 = whole;
  for (int i = 0; i < 28; ++i) {
    x *= x;
    const int bit = static_cast<int>(x >> 61);
    x >>= 30 + bit;
    log2 = 2 * log2 + bit;
  }
  const int64_t noise = (int64_t{33} << 28) - log2;
  return noise > 0 ? noise : 1;
}
// weight / E: the k largest are a sample of k without replacement.
TOKRED_HOST_DEVICE uint32_t lottery_key(int64_t weight, uint64_t seed, int64_t row, int64_t token) {
  if (weight == 0) return kKeyNaN;
  return score_key(static_cast<float>(weight) / static_cast<float>(exponential_noise(seed, row, token)));
}

// factor * x + y, rounded twice whatever the compiler would like to fuse.
TOKRED_HOST_DEVICE double multiply_add_twice_rounded(double factor, double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(__dmul_rn(factor, x), y);
#else
  volatile double product = factor * x;
  return product + y;
#endif
}

}  // namespace tokred
