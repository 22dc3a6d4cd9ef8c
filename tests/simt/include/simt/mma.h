// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Twins of the PTX behind csrc/common/mma.cuh, by the fragment layouts of the PTX ISA. Products are exact and their sum
// is rounded once; the hardware rounds more often, so a test's tolerance covers both.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "simt/core.h"

namespace simt {

struct MmaIn {
  const float* acc;  // [4]
  const uint32_t* a;
  const uint32_t* b;
};

template <typename T>
SIMT_UNSEEN double half_of(uint32_t word, int high) {
  const auto bits = static_cast<uint16_t>(word >> (16 * high));
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(bits));
  return static_cast<double>(static_cast<float>(value));
}
SIMT_UNSEEN inline double tf32_of(uint32_t word) {
  word &= 0xffffe000u;  // the hardware does not look at the low 13 bits
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return static_cast<double>(value);
}

// D = A B + C with A [16 x kDepth], B [kDepth x 8], spread over the lanes as acc is.
template <int kDepth>
SIMT_UNSEEN void multiply(WarpCall& call, const double (&a)[16][kDepth], const double (&b)[kDepth][8]) {
  for (int lane = 0; lane < 32; ++lane) {
    const float* acc = static_cast<const MmaIn*>(call.in[lane])->acc;
    float* out = static_cast<float*>(call.out[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
      double sum = static_cast<double>(acc[i]);
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][col];
      out[i] = static_cast<float>(sum);
    }
  }
}

template <typename T>
SIMT_UNSEEN void run_mma_m16n8k16(WarpCall& call) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaIn*>(call.in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = half_of<T>(in.a[i], half);
      for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + half][g] = half_of<T>(in.b[i], half);
    }
  }
  multiply(call, a, b);
}
inline SIMT_UNSEEN void run_mma_m16n8k8_tf32(WarpCall& call) {
  double a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaIn*>(call.in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32_of(in.a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32_of(in.b[i]);
  }
  multiply(call, a, b);
}

inline SIMT_UNSEEN void mma(const WarpFunction& function, float* acc, const uint32_t* a, const uint32_t* b) {
  const MmaIn in{acc, a, b};
  float out[4];
  warp_call(function, 0xffffffffu, &in, out);
  for (int i = 0; i < 4; ++i) acc[i] = out[i];
}
template <typename T>
void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static constexpr WarpFunction kFunction{"mma_m16n8k16", &run_mma_m16n8k16<T>, false};
  mma(kFunction, acc, a, b);
}
inline void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static constexpr WarpFunction kFunction{"mma_m16n8k8_tf32", &run_mma_m16n8k8_tf32, false};
  mma(kFunction, acc, a, b);
}

template <int kMatrices, bool kTrans>
SIMT_UNSEEN void run_ldmatrix(WarpCall& call) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kMatrices; ++i) {
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = kTrans ? 2 * t + j : g, col = kTrans ? g : 2 * t + j;
        std::memcpy(&pair[j], static_cast<const uint16_t*>(call.in[8 * i + row]) + col, sizeof(uint16_t));
      }
      static_cast<uint32_t*>(call.out[lane])[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}
template <int kMatrices, bool kTrans>
SIMT_UNSEEN void ldmatrix_call(uint32_t* out, const void* row) {
  static constexpr WarpFunction kFunction{"ldmatrix", &run_ldmatrix<kMatrices, kTrans>, false};
  if (lane() < 8 * kMatrices) {
    if (!in_shared(row, 16)) fail("ldmatrix: the row's address is not in shared memory");
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: the row's address is not aligned to 16 bytes");
    touch(row, 16, Access::kRead);
  }
  warp_call(kFunction, 0xffffffffu, row, out);
}
inline SIMT_UNSEEN void ldmatrix(uint32_t* out, int matrices, bool trans, const void* row) {
  if (matrices == 4) {
    trans ? ldmatrix_call<4, true>(out, row) : ldmatrix_call<4, false>(out, row);
  } else {
    trans ? ldmatrix_call<2, true>(out, row) : ldmatrix_call<2, false>(out, row);
  }
}

inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0x007fffffu ? 0x7fffffffu : bits;  // NaN, infinity
  return (bits + 0x1000u) & 0xffffe000u;
}

inline float flush(float value) { return std::fabs(value) < std::numeric_limits<float>::min() ? value * 0.f : value; }
inline float exp2_ftz(float x) { return flush(std::exp2(flush(x))); }
inline float log2_ftz(float x) { return std::log2(flush(x)); }

}  // namespace simt
