// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/gemm_bf16.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dot_panel.h"
#include "common/dot_rows.h"

namespace tokred {

TOKRED_CLONES void pack_rows_bf16(const c10::BFloat16* src, int64_t stride_row, int64_t rows, int64_t depth,
                                  int64_t padded_rows, int64_t padded_depth, c10::BFloat16* dst) {
  constexpr size_t kPiece = kVecLanes * sizeof(c10::BFloat16);
  for (int64_t r = 0; r < padded_rows; ++r) {
    const auto* from = reinterpret_cast<const char*>(src + r * stride_row);
    auto* to = reinterpret_cast<char*>(dst + r * padded_depth);
    const int64_t present = r < rows ? depth : 0;
    int64_t c = 0;
    for (; c + kVecLanes <= present; c += kVecLanes, from += kPiece, to += kPiece) std::memcpy(to, from, kPiece);
    for (; c < padded_depth; c += kVecLanes, from += kPiece, to += kPiece) {
      std::memset(to, 0, kPiece);
      if (c < present) std::memcpy(to, from, static_cast<size_t>(present - c) * sizeof(c10::BFloat16));
    }
  }
}

#if defined(__x86_64__)

namespace {

constexpr int kRows = 8;  // of a tile: 8 x 32 sums are half of the registers
constexpr int64_t kMaxDepth = 256;

// c[rows, 16 * kVecs] at stride_c = a[rows, depth] * panel, whose row d holds values 2 d and 2 d + 1 of each column.
template <int kVecs>
__attribute__((target("avx512f,avx512bf16"))) void multiply(const c10::BFloat16* a, int64_t rows, int64_t depth,
                                                            const float* panel, float* c, int64_t stride_c) {
  for (int64_t i = 0; i < rows; i += kRows) {
    __m512 sum[kRows][kVecs] = {};
    for (int64_t d = 0; d < depth; d += 2) {
      __m512bh column[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) column[v] = (__m512bh)_mm512_load_ps(panel + (d / 2 * kVecs + v) * kVecLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + (i + r) * depth + d, sizeof(pair));
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], both, column[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) _mm512_store_ps(c + (i + r) * stride_c + v * kVecLanes, sum[r][v]);
    }
  }
}

}  // namespace

bool has_gemm_bf16() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

void gemm_nt_bf16(const c10::BFloat16* a, const c10::BFloat16* b, int64_t stride_b, float* c, int64_t m, int64_t n,
                  int64_t depth) {
  alignas(64) float panel[kMaxDepth / 2 * kMaxDotColumns];
  for (int64_t j = 0, width; j < n; j += width) {
    width = n - j < kMaxDotColumns ? kVecLanes : kMaxDotColumns;
    // Pairs move as floats do.
    transpose_panel(reinterpret_cast<const float*>(b + j * stride_b), stride_b / 2, width, depth / 2, panel);
    for (int64_t r = 0; r < kMaxDotColumns; ++r) prefetch(b + (j + width + r) * stride_b, depth * 2);
    (width == kVecLanes ? multiply<1> : multiply<2>)(a, m, depth, panel, c + j, n);
  }
}

#else

bool has_gemm_bf16() { return false; }
void gemm_nt_bf16(const c10::BFloat16*, const c10::BFloat16*, int64_t, float*, int64_t, int64_t, int64_t) {}

#endif

}  // namespace tokred
