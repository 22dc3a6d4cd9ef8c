// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Sums of exponentials that do not overflow, in parts that can be merged.
#pragma once

#include "common/constants.h"
#include "common/mma.cuh"
#include "common/warp.cuh"

namespace tokred {

// sum * 2^peak is a sum of exponentials, 2^-inf of which is 0 for an empty one. NaN shows in the sum.
struct ExpSum {
  float peak = -INFINITY, sum = 0.f;

  __device__ static float safe(float peak) { return peak == -INFINITY ? 0.f : peak; }  // -inf - -inf would be NaN
  __device__ void merge(float other_peak, float other_sum) {
    const float highest = fmaxf(peak, other_peak), base = safe(highest);
    sum = sum * fast_exp2(peak - base) + other_sum * fast_exp2(other_peak - base);
    peak = highest;
  }
  __device__ float lse() const { return sum == 0.f ? -INFINITY : kLn2 * peak + logf(sum); }
};

template <int kWidth>
__device__ inline void warp_merge(ExpSum& x) {  // valid in every lane
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    const float peak = __shfl_xor_sync(kFullMask, x.peak, offset), sum = __shfl_xor_sync(kFullMask, x.sum, offset);
    x.merge(peak, sum);
  }
}

// NaN if either is.
__device__ inline float max_nan(float a, float b) { return b > a || b != b ? b : a; }

}  // namespace tokred
