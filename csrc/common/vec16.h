// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Functions of float vectors for the CPU kernels, made of operations that every clone (TOKRED_CLONES) has.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/dispatch.h"
#include "common/parallel.h"

namespace tokred {

// Sixteen floats: one register with AVX-512, two or four below; the compiler splits it. Passed by reference, since the
// calling convention of a vector depends on the instruction set.
typedef float Vec16 __attribute__((vector_size(64)));
typedef int32_t Vec16i __attribute__((vector_size(64)));
typedef uint32_t Vec16u __attribute__((vector_size(64)));
typedef uint16_t Vec16h __attribute__((vector_size(32)));
constexpr int kVecLanes = 16;
// Half of one, for shuffles that AVX2 has.
typedef float Vec8 __attribute__((vector_size(32)));
typedef int32_t Vec8i __attribute__((vector_size(32)));

// lanes = p[0, 16), widened exactly; p needs no alignment.
TOKRED_INLINE void load16(const float* p, Vec16& lanes) { std::memcpy(&lanes, p, sizeof(lanes)); }
TOKRED_INLINE void load16(const c10::BFloat16* p, Vec16& lanes) {
  Vec16h raw;
  std::memcpy(&raw, p, sizeof(raw));
  const Vec16i wide = __builtin_convertvector(raw, Vec16i) << 16;
  std::memcpy(&lanes, &wide, sizeof(lanes));
}
TOKRED_INLINE void load16(const c10::Half* p, Vec16& lanes) {
  Vec16h raw;
  std::memcpy(&raw, p, sizeof(raw));
  const Vec16i wide = __builtin_convertvector(raw, Vec16i) << 16;
  const Vec16i sign = wide & INT32_MIN, magnitude = wide & INT32_MAX;
  // Normal numbers, infinity and NaN: the exponent moves by 224, then by -112 in a product that leaves infinity alone.
  const Vec16i shifted = (magnitude >> 3) + (0xE0 << 23);
  Vec16 normal;
  std::memcpy(&normal, &shifted, sizeof(normal));
  normal *= 0x1p-112f;
  // Subnormal ones: the fraction put below the leading 1 of 0.5, which is then taken away. No float32 subnormal occurs.
  const Vec16i halves = (magnitude >> 16) | (126 << 23);
  Vec16 subnormal;
  std::memcpy(&subnormal, &halves, sizeof(subnormal));
  subnormal -= 0.5f;
  const Vec16 value = magnitude < (1 << 26) ? subnormal : normal;
  Vec16i bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits |= sign;
  std::memcpy(&lanes, &bits, sizeof(lanes));
}

// Thirty-two values as two vectors. bfloat16 comes deinterleaved, the even ones in a and the odd ones in b: two
// operations where widening in order takes twelve. deinterleave32 puts what meets them into that order, interleave32
// back.
template <typename T>
constexpr bool kDeinterleaves = std::is_same_v<T, c10::BFloat16>;
template <typename T>
TOKRED_INLINE void load32(const T* p, Vec16& a, Vec16& b) {
  if constexpr (kDeinterleaves<T>) {
    Vec16i pairs;
    std::memcpy(&pairs, p, sizeof(pairs));
    const Vec16i even = pairs << 16, odd = pairs & static_cast<int32_t>(0xffff0000u);
    std::memcpy(&a, &even, sizeof(a));
    std::memcpy(&b, &odd, sizeof(b));
  } else {
    load16(p, a);
    load16(p + kVecLanes, b);
  }
}
inline void deinterleave32(float* x) {
  float in[32];
  std::memcpy(in, x, sizeof(in));
  for (int i = 0; i < 32; ++i) x[i / 2 + i % 2 * kVecLanes] = in[i];
}
inline void interleave32(float* x) {
  float in[32];
  std::memcpy(in, x, sizeof(in));
  for (int i = 0; i < 32; ++i) x[i] = in[i / 2 + i % 2 * kVecLanes];
}

TOKRED_INLINE void store16(float* p, const Vec16& lanes) { std::memcpy(p, &lanes, sizeof(lanes)); }

// lanes = p[0, count) and zeros; count < 16. Reads nothing beyond.
template <typename T>
TOKRED_INLINE void load_part(const T* p, int64_t count, Vec16& lanes) {
  T part[kVecLanes];
  std::memset(static_cast<void*>(part), 0, sizeof(part));
  std::memcpy(static_cast<void*>(part), p, static_cast<size_t>(count) * sizeof(T));
  load16(part, lanes);
}

// sums[j] = the sum of the lanes of in[j], all 8 by a tree of shuffles that are one instruction each.
TOKRED_INLINE void sum_lanes8(const Vec16* in, float* sums) {
  Vec8 t[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    t[j] = __builtin_shufflevector(in[j], in[j], 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(in[j], in[j], 8, 9, 10, 11, 12, 13, 14, 15);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = __builtin_shuffle(t[2 * j], t[2 * j + 1], Vec8i{0, 8, 1, 9, 4, 12, 5, 13}) +
           __builtin_shuffle(t[2 * j], t[2 * j + 1], Vec8i{2, 10, 3, 11, 6, 14, 7, 15});
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    t[j] = __builtin_shuffle(t[2 * j], t[2 * j + 1], Vec8i{0, 1, 8, 9, 4, 5, 12, 13}) +
           __builtin_shuffle(t[2 * j], t[2 * j + 1], Vec8i{2, 3, 10, 11, 6, 7, 14, 15});
  }
  const Vec8 all = __builtin_shuffle(t[0], t[1], Vec8i{0, 1, 2, 3, 8, 9, 10, 11}) +
                   __builtin_shuffle(t[0], t[1], Vec8i{4, 5, 6, 7, 12, 13, 14, 15});
  std::memcpy(sums, &all, sizeof(all));
}

// x = e^x, relative error below 2 ulp; 0 below -87.3 (where float32 turns subnormal) and for -inf, inf above 88.7, NaN
// for NaN.
TOKRED_INLINE void exp16(Vec16& x) {
  const Vec16 t = x * 1.44269504088896341f;
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
  const Vec16 shifted = t + 12582912.f;
  const Vec16 n = shifted - 12582912.f;
  Vec16u exponent;  // unsigned: in lanes that are overwritten below, the sums of bits may wrap
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent - 0x4B400000u) << 23;
  // ln 2 in two parts: the first times n is exact.
  const Vec16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Taylor's series of e^r on |r| <= 0.347 with its last terms adjusted (Cephes' expf coefficients).
  Vec16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  Vec16u bits;
  std::memcpy(&bits, &p, sizeof(bits));
  bits += exponent;
  Vec16 y;
  std::memcpy(&y, &bits, sizeof(y));
  const Vec16 zero = {};
  y = x < -87.3f ? zero : y;
  y = x > 88.7f ? zero + __builtin_inff() : y;
  x = x == x ? y : x;
}

}  // namespace tokred
