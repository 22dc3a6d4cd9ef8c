// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A row is read a few times by vector loops and never sorted. Long rows are first cut down: a strided sample gives a
// pivot below which nothing can matter (checked by counting, with the whole row as fallback), and its survivors are
// written in order. The exact k-th key is then found by bisection over the keys: at most 32 counting passes, no branch
// depends on the data, ties cost nothing. A last pass writes the positions, already in order.
#include "common/topk.h"

#include <cstring>

#if defined(__x86_64__) && !defined(TOKRED_SANITIZE)
#include <immintrin.h>
#define TOKRED_HAS_AVX512_PATH 1
#endif

namespace tokred {
namespace {

// Keys as signed integers, for which every instruction set has a comparison.
TOKRED_INLINE int32_t signed_key(uint32_t key) { return static_cast<int32_t>(key ^ 0x80000000u); }
constexpr int32_t kExcluded = INT32_MIN;

template <typename T>
TOKRED_CLONES void plain_keys(const T* score, int64_t stride, int64_t n, int32_t* keys) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) keys[i] = signed_key(score_key(static_cast<float>(score[i])));
  } else {
    for (int64_t i = 0; i < n; ++i) keys[i] = signed_key(score_key(static_cast<float>(score[i * stride])));
  }
}

TOKRED_CLONES int64_t count_at_least(const int32_t* keys, int64_t n, int32_t bound) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += 1 << 20) {  // 32-bit counters inside, wide enough for one piece
    const int64_t end = n < begin + (1 << 20) ? n : begin + (1 << 20);
    int32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += keys[i] >= bound;
    total += count;
  }
  return total;
}

TOKRED_CLONES void key_range(const int32_t* keys, int64_t n, int32_t* lowest, int32_t* highest) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  *lowest = low;
  *highest = high;
}

// Writes base + i for each keys[i] >= bound, ascending, and the keys themselves if kept_keys is given. Both outputs need
// 16 elements of slack. Branch-free: about one element per cycle.
int64_t compact_portable(const int32_t* keys, int64_t n, int32_t bound, int32_t base, int32_t* out, int32_t* kept_keys) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[count] = base + static_cast<int32_t>(i);
    if (kept_keys) kept_keys[count] = keys[i];
    count += keys[i] >= bound;
  }
  return count;
}

#ifdef TOKRED_HAS_AVX512_PATH
// Sixteen at a time: compress in a register, store all, advance by the count. (A compressing store is slow on some CPUs.)
__attribute__((target("avx512f,popcnt"))) int64_t compact_avx512(const int32_t* keys, int64_t n, int32_t bound,
                                                                 int32_t base, int32_t* out, int32_t* kept_keys) {
  const __m512i limit = _mm512_set1_epi32(bound);
  __m512i position = _mm512_add_epi32(_mm512_set1_epi32(base),
                                      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i step = _mm512_set1_epi32(16);
  int64_t count = 0, i = 0;
  for (; i + 16 <= n; i += 16, position = _mm512_add_epi32(position, step)) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 take = _mm512_cmpge_epi32_mask(key, limit);
    if (take == 0) continue;
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(take, position));
    if (kept_keys) _mm512_storeu_si512(kept_keys + count, _mm512_maskz_compress_epi32(take, key));
    count += __builtin_popcount(take);
  }
  return count + compact_portable(keys + i, n - i, bound, base + static_cast<int32_t>(i), out + count,
                                  kept_keys ? kept_keys + count : nullptr);
}
#endif

using Compact = int64_t (*)(const int32_t*, int64_t, int32_t, int32_t, int32_t*, int32_t*);
const Compact compact = [] {
#ifdef TOKRED_HAS_AVX512_PATH
  if (__builtin_cpu_supports("avx512f")) return &compact_avx512;
#endif
  return &compact_portable;
}();

// The largest bound with at least k keys at or above it: the k-th largest key. 1 <= k <= n.
int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k) {
  int32_t low, high;
  key_range(keys, n, &low, &high);
  int64_t lo = low, hi = int64_t{high} + 1;  // at least k keys are >= lo; fewer than k are >= hi
  while (hi - lo > 1) {
    const int64_t mid = lo + (hi - lo) / 2;
    const int64_t count = count_at_least(keys, n, static_cast<int32_t>(mid));
    if (count >= k) {
      lo = mid;
      if (count == k) break;  // selects exactly the k wanted, as the k-th key itself would
    } else {
      hi = mid;
    }
  }
  return static_cast<int32_t>(lo);
}

constexpr int64_t kSample = 512;  // keys looked at to guess a pivot

// A bound that about 1.5 k + slack keys reach, by the k's place in a sorted strided sample.
int32_t guess_pivot(const int32_t* keys, int64_t n, int64_t k) {
  int32_t sample[kSample];
  const int64_t stride = n / kSample;
  // The start moves within each stride by a fixed pattern, so that a period of the data cannot hide from the sample.
  for (int64_t i = 0; i < kSample; ++i) sample[i] = keys[i * stride + (i * 40503) % stride];
  const int64_t expected = k * kSample / n;
  int64_t rank = expected + 2;
  while (rank < kSample && (rank - expected) * (rank - expected) < 12 * (expected + 1)) ++rank;  // 3.5 sigma
  return rank >= kSample ? kExcluded : kth_largest(sample, kSample, rank);
}

}  // namespace

template <typename T>
int64_t make_keys(const T* score, int64_t stride, const uint8_t* keep, const uint8_t* drop, int64_t n, int64_t k,
                  TopkScratch& scratch) {
  int32_t* keys = scratch.keys.data();
  plain_keys(score, stride, n, keys);
  if (!keep && !drop) return n;
  int64_t forced = 0, excluded = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool out = drop && drop[i];
    excluded += out;
    forced += !out && keep && keep[i];
  }
  const bool crowded = forced > k;
  for (int64_t i = 0; i < n; ++i) {
    const bool force = keep && keep[i];
    if ((drop && drop[i]) || (crowded && !force)) {
      keys[i] = kExcluded;
    } else if (force && !crowded) {
      keys[i] = signed_key(kKeyForced);
    }
  }
  return crowded ? forced : n - excluded;
}

template int64_t make_keys(const float*, int64_t, const uint8_t*, const uint8_t*, int64_t, int64_t, TopkScratch&);
template int64_t make_keys(const c10::Half*, int64_t, const uint8_t*, const uint8_t*, int64_t, int64_t, TopkScratch&);
template int64_t make_keys(const c10::BFloat16*, int64_t, const uint8_t*, const uint8_t*, int64_t, int64_t,
                           TopkScratch&);

int64_t topk_ascending(int64_t n, int64_t k, int64_t eligible, int32_t* out, TopkScratch& scratch) {
  k = k < eligible ? k : eligible;
  if (k <= 0) return 0;
  const int32_t* keys = scratch.keys.data();
  const int32_t* positions = nullptr;  // of the survivors; null: all tokens are
  if (n >= 8 * kSample && k <= n / 4) {
    const int32_t pivot = guess_pivot(keys, n, k);
    if (pivot > kExcluded + 1) {
      const int64_t survivors = compact(keys, n, pivot, 0, scratch.survivor_idx.data(), scratch.survivors.data());
      if (survivors >= k) {  // else the guess was too high: use the whole row
        keys = scratch.survivors.data();
        positions = scratch.survivor_idx.data();
        n = survivors;
      }
    }
  }
  const int32_t bound = kth_largest(keys, n, k);
  int64_t surplus = count_at_least(keys, n, bound) - k;  // ties of the bound beyond k: the last ones leave
  int64_t tied = n;                                      // tokens from here on need a key above the bound
  while (surplus > 0) surplus -= keys[--tied] == bound;
  int64_t count = compact(keys, tied, bound, 0, out, nullptr);
  if (tied < n && bound < INT32_MAX)
    count += compact(keys + tied, n - tied, bound + 1, static_cast<int32_t>(tied), out + count, nullptr);
  if (positions) {
    for (int64_t i = 0; i < count; ++i) out[i] = positions[out[i]];
  }
  return count;
}

}  // namespace tokred
