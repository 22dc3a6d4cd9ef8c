// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Sixteen floats at a time, and 2^x over them, for the CPU kernels: one AVX-512 register, two of AVX2, four of SSE or NEON,
// as the function that uses them is compiled (TOKRED_CLONES). Everything here is inlined into that function.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/parallel.h"

#if defined(__GNUC__) && !defined(__clang__)
// How a vector would be passed without AVX-512: never seen, as all is inlined. Left ignored, for the warning comes where
// the functions are used.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace tokred {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef uint32_t UInt16 __attribute__((vector_size(64)));
constexpr int kVectorLanes = 16;

// No alignment is asked for.
TOKRED_INLINE Float16 load_vector(const float* p) {
  Float16 v;
  memcpy(&v, p, sizeof(v));
  return v;
}
TOKRED_INLINE void store_vector(float* p, const Float16& v) { memcpy(p, &v, sizeof(v)); }
TOKRED_INLINE Float16 broadcast(float x) { return Float16{} + x; }
TOKRED_INLINE Int16 lane_numbers() { return Int16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// The greater; b where a is NaN, a where b is.
TOKRED_INLINE Float16 vector_max(const Float16& a, const Float16& b) {
  const Float16 greater = b > a ? b : a;
  return a == a ? greater : b;
}
// NaN where either is.
TOKRED_INLINE Float16 vector_max_nan(const Float16& a, const Float16& b) {
  const Float16 greater = b > a ? b : a;
  return b == b ? greater : b;
}

// Over the lanes, in a fixed order of halves.
TOKRED_INLINE float lane_sum(const Float16& v) {
  float x[16];
  memcpy(x, &v, sizeof(x));
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}
TOKRED_INLINE float lane_max(const Float16& v) {  // NaN is ignored unless all are NaN
  float x[16];
  memcpy(x, &v, sizeof(x));
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = x[i + width] > x[i] || x[i] != x[i] ? x[i + width] : x[i];
  }
  return x[0];
}

// 2^x, relative error below 2e-7. 0 below 2^-125 (and for -inf), +inf from 2^128 on, NaN for NaN.
TOKRED_INLINE Float16 vector_exp2(const Float16& x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer n in the low bits
  const Float16 lowest = broadcast(-125.f), highest = broadcast(128.f);
  Float16 v = x < lowest ? lowest : x;
  v = v > highest ? highest : v;
  const Float16 shifted = v + kRound;
  const Float16 f = v - (shifted - kRound);  // in [-1/2, 1/2], exact
  // 2 * 2^f: (2^f - 1) / f interpolated at the 6 Chebyshev nodes of [-1/2, 1/2]. Doubled, so that the other factor is
  // 2^(n - 1): a finite number for n = 128 and a normal one for n = -125.
  Float16 p = broadcast(2 * 0.00015453163f);
  p = p * f + 2 * 0.0013390863f;
  p = p * f + 2 * 0.009618083f;
  p = p * f + 2 * 0.05550357f;
  p = p * f + 2 * 0.24022651f;
  p = p * f + 2 * 0.6931472f;
  p = p * f + 2.f;
  UInt16 bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (126u << 23);  // the bits of 2^(n - 1); those of kRound itself are shifted out
  Float16 scale;
  memcpy(&scale, &bits, sizeof(bits));
  return x < lowest ? Float16{} : p * scale;
}

}  // namespace tokred
