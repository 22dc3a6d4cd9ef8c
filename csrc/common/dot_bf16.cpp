// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/dot_bf16.h"

#include "common/dot_rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokred {

#if defined(__x86_64__)
namespace {

// The attribute is lost where a template was declared without it, so this one has no declaration.
template <int kRows>
__attribute__((target("arch=x86-64-v4,avx512bf16"))) void dot(const c10::BFloat16* k, const int64_t* offset,
                                                              int64_t begin, int64_t end, const c10::BFloat16* q,
                                                              int64_t q_stride, int64_t dim, bool fetch, float* score,
                                                              int64_t score_stride) {
  constexpr int kKeys = kRows == 1 ? 8 : 4;
  constexpr int kSums = kRows * kKeys;
  for (int64_t i = begin; i < end; i += kKeys) {
    const c10::BFloat16* row[kKeys];
    for (int j = 0; j < kKeys; ++j) {
      row[j] = k + offset[i + j];
      if (fetch) prefetch(k + offset[i + j + kBf16Ahead], dim * int64_t{sizeof(c10::BFloat16)});
    }
    __m512 sum[kSums];  // [kRows, kKeys]
    for (int s = 0; s < kSums; ++s) sum[s] = _mm512_setzero_ps();
    for (int64_t c = 0; c < dim; c += kDotBf16Step) {
      const __mmask32 in_row = dim - c >= kDotBf16Step ? ~0u : (1u << (dim - c)) - 1;
      __m512bh key[kKeys];
#pragma GCC unroll 8
      for (int j = 0; j < kKeys; ++j) key[j] = (__m512bh)_mm512_maskz_loadu_epi16(in_row, row[j] + c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512bh query = (__m512bh)_mm512_loadu_si512(q + r * q_stride + c);
#pragma GCC unroll 8
        for (int j = 0; j < kKeys; ++j) sum[r * kKeys + j] = _mm512_dpbf16_ps(sum[r * kKeys + j], query, key[j]);
      }
    }
    Vec16 lanes[kSums];
    std::memcpy(lanes, sum, sizeof(lanes));
    float sums[kSums];
#pragma GCC unroll 2
    for (int s = 0; s < kSums; s += 8) sum_lanes8(lanes + s, sums + s);
    for (int r = 0; r < kRows; ++r) std::memcpy(score + r * score_stride + i, sums + r * kKeys, kKeys * sizeof(float));
  }
}

}  // namespace

bool has_dot_bf16() {
  static const bool has = __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  return has;
}
#else
bool has_dot_bf16() { return false; }
#endif

template <int kRows>
void dot_rows_bf16(const c10::BFloat16* k, const int64_t* offset, int64_t begin, int64_t end, const c10::BFloat16* q,
                   int64_t q_stride, int64_t dim, bool fetch, float* score, int64_t score_stride) {
#if defined(__x86_64__)
  dot<kRows>(k, offset, begin, end, q, q_stride, dim, fetch, score, score_stride);
#endif
}

template void dot_rows_bf16<1>(const c10::BFloat16*, const int64_t*, int64_t, int64_t, const c10::BFloat16*, int64_t,
                               int64_t, bool, float*, int64_t);
template void dot_rows_bf16<4>(const c10::BFloat16*, const int64_t*, int64_t, int64_t, const c10::BFloat16*, int64_t,
                               int64_t, bool, float*, int64_t);

}  // namespace tokred
