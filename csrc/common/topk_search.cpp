// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// The k-th key is found by counting how many keys reach three pivots at a time: first pivots out of a sample, between
// two of which few keys remain, then two bits a pass.
#include "common/topk_search.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define TOKRED_HAS_AVX512_PATH 1
#endif

namespace tokred {
namespace {

TOKRED_CLONES void key_range(const int32_t* keys, int64_t n, int32_t* lowest, int32_t* highest) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  *lowest = low;
  *highest = high;
}

// Branch-free: about one element per cycle.
int64_t compact_portable(const int32_t* keys, int64_t n, int32_t bound, int32_t base, int32_t* out,
                         int32_t* kept_keys) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[count] = base + static_cast<int32_t>(i);
    if (kept_keys) kept_keys[count] = keys[i];
    count += keys[i] >= bound;
  }
  return count;
}

#ifdef TOKRED_HAS_AVX512_PATH
// Sixteen at a time: compress in a register, store all, advance by the count. (A compressing store is slow on some
// CPUs.)
__attribute__((target("avx512f,popcnt"))) int64_t compact_avx512(const int32_t* keys, int64_t n, int32_t bound,
                                                                 int32_t base, int32_t* out, int32_t* kept_keys) {
  const __m512i limit = _mm512_set1_epi32(bound);
  __m512i position = _mm512_add_epi32(_mm512_set1_epi32(base),
                                      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i step = _mm512_set1_epi32(16);
  int64_t count = 0, i = 0;
#pragma GCC unroll 4
  for (; i + 16 <= n; i += 16, position = _mm512_add_epi32(position, step)) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 take = _mm512_cmpge_epi32_mask(key, limit);
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(take, position));
    if (kept_keys) _mm512_storeu_si512(kept_keys + count, _mm512_maskz_compress_epi32(take, key));
    count += __builtin_popcount(take);
  }
  return count + compact_portable(keys + i, n - i, bound, base + static_cast<int32_t>(i), out + count,
                                  kept_keys ? kept_keys + count : nullptr);
}
#endif

}  // namespace

const CompactKeys compact_keys = [] {
#ifdef TOKRED_HAS_AVX512_PATH
  if (__builtin_cpu_supports("avx512f")) return &compact_avx512;
#endif
  return &compact_portable;
}();

namespace {

int64_t reaching_portable(const float* score, int64_t n, float bound, int32_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[count] = static_cast<int32_t>(i);
    count += score[i] >= bound;
  }
  return count;
}

#ifdef TOKRED_HAS_AVX512_PATH
// No branch on the data: with one survivor in some thirty tokens none would be predicted. Four vectors a step, so that
// the running count is a chain of one addition.
__attribute__((target("avx512f,popcnt"))) int64_t reaching_avx512(const float* score, int64_t n, float bound,
                                                                  int32_t* out) {
  const __m512 limit = _mm512_set1_ps(bound);
  const __m512i step = _mm512_set1_epi32(16);
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int line = 0; line < 4; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(score + i + 1024 + 16 * line), _MM_HINT_T0);
    __mmask16 take[4];
    for (int v = 0; v < 4; ++v) take[v] = _mm512_cmp_ps_mask(_mm512_loadu_ps(score + i + 16 * v), limit, _CMP_GE_OQ);
    int64_t offset[5] = {count};
    for (int v = 0; v < 4; ++v) offset[v + 1] = offset[v] + __builtin_popcount(take[v]);
    for (int v = 0; v < 4; ++v, position = _mm512_add_epi32(position, step)) {
      _mm512_storeu_si512(out + offset[v], _mm512_maskz_compress_epi32(take[v], position));
    }
    count = offset[4];
  }
  for (; i < n; ++i) {
    out[count] = static_cast<int32_t>(i);
    count += score[i] >= bound;
  }
  return count;
}
#endif

}  // namespace

const ReachingScores reaching_scores = [] {
#ifdef TOKRED_HAS_AVX512_PATH
  if (__builtin_cpu_supports("avx512f")) return &reaching_avx512;
#endif
  return &reaching_portable;
}();

namespace {

// How many of keys[0, n), n < 2^31, reach each of three pivots.
TOKRED_CLONES void count_three_portable(const int32_t* keys, int64_t n, const int32_t* pivot, int64_t* count) {
  const int32_t p0 = pivot[0], p1 = pivot[1], p2 = pivot[2];
  int32_t c0 = 0, c1 = 0, c2 = 0;
  for (int64_t i = 0; i < n; ++i) {
    c0 += keys[i] >= p0;
    c1 += keys[i] >= p1;
    c2 += keys[i] >= p2;
  }
  count[0] = c0;
  count[1] = c1;
  count[2] = c2;
}

// Writes the keys in [low, high), in order; inside may be keys, else it needs 16 elements of slack. Returns how many.
int64_t between_portable(const int32_t* keys, int64_t n, int64_t low, int64_t high, int32_t* inside) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i];
    inside[count] = key;
    count += key >= low && key < high;
  }
  return count;
}

#ifdef TOKRED_HAS_AVX512_PATH
// Of sixteen lanes from i on those before n: keys may be read 15 elements beyond their end.
TOKRED_INLINE uint16_t lanes_before(int64_t n, int64_t i) {
  return static_cast<uint16_t>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
}

__attribute__((target("avx512f,popcnt"))) void count_three_avx512(const int32_t* keys, int64_t n, const int32_t* pivot,
                                                                  int64_t* count) {
  const __m512i p0 = _mm512_set1_epi32(pivot[0]), p1 = _mm512_set1_epi32(pivot[1]), p2 = _mm512_set1_epi32(pivot[2]);
  int64_t c0 = 0, c1 = 0, c2 = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = lanes_before(n, i);
    const __m512i key = _mm512_loadu_si512(keys + i);
    c0 += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(lanes, key, p0));
    c1 += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(lanes, key, p1));
    c2 += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(lanes, key, p2));
  }
  count[0] = c0;
  count[1] = c1;
  count[2] = c2;
}

__attribute__((target("avx512f,popcnt"))) int64_t between_avx512(const int32_t* keys, int64_t n, int64_t low,
                                                                 int64_t high, int32_t* inside) {
  const __m512i first = _mm512_set1_epi32(static_cast<int32_t>(low));
  const __m512i last = _mm512_set1_epi32(static_cast<int32_t>(high - 1));
  int64_t count = 0;
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 reach = _mm512_mask_cmpge_epi32_mask(lanes_before(n, i), key, first);
    const __mmask16 take = _mm512_mask_cmple_epi32_mask(reach, key, last);
    _mm512_storeu_si512(inside + count, _mm512_maskz_compress_epi32(take, key));
    count += __builtin_popcount(take);
  }
  return count;
}
#endif

using CountThree = void (*)(const int32_t*, int64_t, const int32_t*, int64_t*);
const CountThree count_three = [] {
#ifdef TOKRED_HAS_AVX512_PATH
  if (__builtin_cpu_supports("avx512f")) return &count_three_avx512;
#endif
  return &count_three_portable;
}();
using Between = int64_t (*)(const int32_t*, int64_t, int64_t, int64_t, int32_t*);
const Between between = [] {
#ifdef TOKRED_HAS_AVX512_PATH
  if (__builtin_cpu_supports("avx512f")) return &between_avx512;
#endif
  return &between_portable;
}();

// Three ascending pivots about where the k-th largest key is likely to be, by its place in a sample.
TOKRED_CLONES void guess_pivots(const int32_t* keys, int64_t n, int64_t k, int32_t* pivot) {
  // The lowest bits make way for a number, so that all differ. Places move within strides, as in guess_pivot.
  constexpr int kGuessed = 16, kLast = kGuessed - 1;
  int32_t sample[kGuessed], rank[kGuessed] = {};
  const uint64_t stride = static_cast<uint64_t>(n) / kGuessed;
  for (uint32_t i = 0; i < kGuessed; ++i) {
    sample[i] = (keys[i * stride + (i * 2654435769u * stride >> 32)] & ~kLast) | static_cast<int32_t>(i);
  }
  for (int j = 0; j < kGuessed; ++j) {
    for (int i = 0; i < kGuessed; ++i) rank[i] += sample[j] > sample[i];
  }
  constexpr int kMargin = 3;  // at least one and a half deviations of the k-th key's rank in the sample
  const int expected = static_cast<int>(k * kGuessed / n);
  const int wanted[] = {expected + kMargin < kLast ? expected + kMargin : kLast, expected < kLast ? expected : kLast,
                        expected > kMargin ? expected - kMargin : 0};
  for (int p = 0; p < 3; ++p) {
    int32_t found = 0;
    for (int i = 0; i < kGuessed; ++i) found |= rank[i] == wanted[p] ? sample[i] : 0;
    pivot[p] = found & ~kLast;
  }
}

}  // namespace

KthKey kth_largest(const int32_t* keys, int64_t n, int64_t k, int32_t* spare) {
  int64_t lo = INT32_MIN, hi = int64_t{INT32_MAX} + 1;  // at least k keys are >= lo, fewer than k are >= hi:
  int64_t reach_lo = n, reach_hi = 0;                   // so many
  const auto narrow = [&](const int32_t* pivot) {
    int64_t count[3];
    count_three(keys, n, pivot, count);
    for (int p = 2; p >= 0; --p) {
      if (count[p] >= k) {
        lo = pivot[p];
        reach_lo = count[p];
        break;
      }
      hi = pivot[p];
      reach_hi = count[p];
    }
  };
  int32_t pivot[3];
  int64_t larger = 0;            // keys that are not looked at any more
  constexpr int64_t kFew = 208;  // keys that are searched without a guess
  while (n > kFew && reach_lo > k) {
    guess_pivots(keys, n, k, pivot);
    narrow(pivot);
    const int64_t inside = reach_lo - reach_hi;
    if (inside > n / 2) break;  // ties
    between(keys, n, lo, hi, spare);
    keys = spare;
    larger += reach_hi;
    k -= reach_hi;
    n = reach_lo = inside;
    reach_hi = 0;
  }
  if (reach_lo > k) {
    int32_t low, high;
    key_range(keys, n, &low, &high);
    lo = lo > low ? lo : low;
    hi = hi <= high ? hi : int64_t{high} + 1;
  }
  while (reach_lo > k && hi - lo > 1) {
    const int64_t step = (hi - lo + 3) / 4;
    for (int p = 0; p < 3; ++p) {
      const int64_t place = lo + (p + 1) * step;
      pivot[p] = static_cast<int32_t>(place < hi ? place : hi - 1);
    }
    narrow(pivot);
  }
  return {static_cast<int32_t>(lo), larger + reach_lo};
}

}  // namespace tokred
