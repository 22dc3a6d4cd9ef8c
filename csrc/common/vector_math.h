// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Arithmetic for loops that the compiler vectorises: plain float code without branches, inlined into TOKRED_CLONES
// functions. (Not vector types: GCC splits those for the baseline before a clone sees them.)
#pragma once
#include <cstdint>
#include <cstring>

#include "common/parallel.h"

namespace tokred {

// A row is reduced in this many running values, element i into value i % kLanes: floats may not be reordered, so a loop
// over the lanes vectorises where one over a single sum would not. Bits do not depend on the width of the machine.
constexpr int kLanes = 64;

// In halves, a fixed order.
TOKRED_INLINE float sum_lanes(float (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
TOKRED_INLINE float max_lanes(float (&lanes)[kLanes]) {  // none is NaN
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i + width] > lanes[i] ? lanes[i + width] : lanes[i];
  }
  return lanes[0];
}

// 2^x, relative error below 2e-7. 0 below 2^-125 (and for -inf), +inf from 2^128 on, NaN for NaN.
TOKRED_INLINE float poly_exp2(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer n in the low bits
  const float shifted = x + kRound;
  const float f = x - (shifted - kRound);  // in [-1/2, 1/2], exact; beyond the range all this is without meaning
  // 2 * 2^f: (2^f - 1) / f interpolated at the 6 Chebyshev nodes of [-1/2, 1/2]. Doubled, so that the other factor is
  // 2^(n - 1): a finite number for n = 128 and a normal one for n = -125.
  float p = 2 * 0.00015453163f;
  p = p * f + 2 * 0.0013390863f;
  p = p * f + 2 * 0.009618083f;
  p = p * f + 2 * 0.05550357f;
  p = p * f + 2 * 0.24022651f;
  p = p * f + 2 * 0.6931472f;
  p = p * f + 2.f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (126u << 23);  // the bits of 2^(n - 1); those of kRound itself are shifted out
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  const float y = p * scale, small = x < -125.f ? 0.f : y;
  return x > 128.f ? __builtin_inff() : small;
}

// tanh(x), relative error below 4e-7; NaN for NaN.
TOKRED_INLINE float poly_tanh(float x) {
  const float magnitude = x < 0.f ? -x : x;
  // e^(-2 |x|), which leaves no digits of a small x: there an odd polynomial (Cephes' tanhf coefficients).
  const float e = poly_exp2(magnitude * -2.88539008177792681f);
  const float large = (1.f - e) / (1.f + e), z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * x + x;
  return magnitude < 0.625f ? small : x < 0.f ? -large : large;
}

}  // namespace tokred
