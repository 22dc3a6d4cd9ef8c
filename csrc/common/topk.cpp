// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A row is read by vector loops and never sorted. Long rows are first cut down: a strided sample gives a pivot below
// which nothing can matter (checked by counting, with the whole row as fallback), and one pass over the scores writes
// its survivors, in order. The exact k-th key is then found by counting how many keys reach three pivots at a time:
// first pivots out of a sample, between two of which few keys remain, then two bits a pass. A last pass writes the
// positions, already in order.
#include "common/topk.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
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

TOKRED_CLONES void key_range(const int32_t* keys, int64_t n, int32_t* lowest, int32_t* highest) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  *lowest = low;
  *highest = high;
}

// Writes base + i for each keys[i] >= bound, ascending, and the keys themselves if kept_keys is given. Both outputs
// need 16 elements of slack. Branch-free: about one element per cycle.
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

using Compact = int64_t (*)(const int32_t*, int64_t, int32_t, int32_t, int32_t*, int32_t*);
const Compact compact = [] {
#ifdef TOKRED_HAS_AVX512_PATH
  if (__builtin_cpu_supports("avx512f")) return &compact_avx512;
#endif
  return &compact_portable;
}();

// Positions of the scores that reach a number, ascending; NaN never does. out needs 16 elements of slack.
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

using Reaching = int64_t (*)(const float*, int64_t, float, int32_t*);
const Reaching reaching = [] {
#ifdef TOKRED_HAS_AVX512_PATH
  if (__builtin_cpu_supports("avx512f")) return &reaching_avx512;
#endif
  return &reaching_portable;
}();

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

// A bound that count >= k keys reach, and none above it that k do; or one that exactly k reach.
struct Cut {
  int32_t bound;
  int64_t count;
};

// 1 <= k <= n; spare has room for n keys and 16 more.
Cut kth_largest(const int32_t* keys, int64_t n, int64_t k, int32_t* spare) {
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

constexpr int64_t kSample = 512;  // keys looked at to guess a pivot

// A bound that about k + 3.5 sigma keys reach, by the k's place in a strided sample.
template <typename T>
int32_t guess_pivot(const TopkRow<T>& row, int64_t k) {
  int32_t sample[kSample];
  // Neighbours in fours: a quarter of the cache misses. The place moves within each stride by a fixed pattern, so that
  // a period of the data cannot hide from the sample.
  constexpr int64_t kGroup = 4;
  const int64_t stride = kGroup * (row.num_tokens / kSample);
  for (int64_t i = 0; i < kSample; ++i) {
    const int64_t group = i / kGroup, token = group * stride + (group * 40503) % (stride - kGroup + 1) + i % kGroup;
    sample[i] = signed_key(score_key(static_cast<float>(row.score[token * row.stride])));
  }
  const int64_t expected = k * kSample / row.num_tokens;
  int64_t rank = expected + 2;
  while (rank < kSample && (rank - expected) * (rank - expected) < 12 * (expected + 1)) ++rank;
  int32_t spare[kSample + 16];
  return rank >= kSample ? kExcluded : kth_largest(sample, kSample, rank, spare).bound;
}

// Keys and positions of the tokens that reach pivot, the key of a number.
template <typename T>
int64_t survivors(const TopkRow<T>& row, int32_t pivot, TopkScratch& scratch) {
  int32_t *keys = scratch.keys.data(), *positions = scratch.positions.data();
  int64_t count = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (row.stride == 1) {  // floats are compared as they are; a flush-denormals mode can only let more of them pass
      const uint32_t key = static_cast<uint32_t>(pivot) ^ 0x80000000u;
      const uint32_t bits = key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu);  // the inverse of score_key
      float bound;
      std::memcpy(&bound, &bits, sizeof(bound));
      count = reaching(row.score, row.num_tokens, bound, positions);
      for (int64_t i = 0; i < count; ++i) keys[i] = signed_key(score_key(row.score[positions[i]]));
      return count;
    }
  }
  constexpr int64_t kPiece = 2048;  // others are converted piece by piece in the first-level cache
  alignas(64) int32_t piece[kPiece];
  for (int64_t begin = 0; begin < row.num_tokens; begin += kPiece) {
    const int64_t n = row.num_tokens - begin < kPiece ? row.num_tokens - begin : kPiece;
    plain_keys(row.score + begin * row.stride, row.stride, n, piece);
    count += compact(piece, n, pivot, static_cast<int32_t>(begin), positions + count, keys + count);
  }
  return count;
}

// Ranks changed by what is forced and excluded; returns how many tokens are eligible. Selects, not branches: masks are
// not to be predicted.
template <bool kKeep, bool kDrop>
TOKRED_CLONES int64_t apply_masks(const uint8_t* keep, const uint8_t* drop, int32_t keep_before, int32_t keep_from,
                                  int32_t n, int64_t k, int32_t* keys) {
  int32_t forced = 0, excluded = 0;
  for (int32_t i = 0; i < n; ++i) {
    int32_t out = 0, force = (i < keep_before) | (i >= keep_from);
    if constexpr (kDrop) out = drop[i] != 0;
    if constexpr (kKeep) force |= keep[i] != 0;
    excluded += out;
    forced += force & ~out;
  }
  const int32_t crowded = forced > k;  // then only the forced compete, by their scores
  for (int32_t i = 0; i < n; ++i) {
    int32_t out = 0, force = (i < keep_before) | (i >= keep_from);
    if constexpr (kDrop) out = drop[i] != 0;
    if constexpr (kKeep) force |= keep[i] != 0;
    const int32_t key = force & ~crowded ? signed_key(kKeyForced) : keys[i];
    keys[i] = out | (crowded & ~force) ? kExcluded : key;
  }
  return crowded ? forced : n - excluded;
}

template <typename T>
int64_t mask_keys(const TopkRow<T>& row, int64_t k, int32_t* keys) {
  const auto apply = row.keep   ? row.drop ? apply_masks<true, true> : apply_masks<true, false>
                       : row.drop ? apply_masks<false, true>
                                : apply_masks<false, false>;
  return apply(row.keep, row.drop, row.keep_before, row.keep_from, row.num_tokens, k, keys);
}

// Writes the places in keys[0, n) of the k largest, ascending; at least k keys are eligible.
void take_largest(const int32_t* keys, int64_t n, int64_t k, int32_t* spare, int32_t* out) {
  const auto [bound, reached] = kth_largest(keys, n, k, spare);
  int64_t surplus = reached - k;  // ties of the bound beyond k: the last ones leave
  int64_t tied = n;               // tokens from here on need a key above the bound
  while (surplus > 0) surplus -= keys[--tied] == bound;
  const int64_t count = compact(keys, tied, bound, 0, out, nullptr);
  if (tied < n && bound < INT32_MAX) {
    compact(keys + tied, n - tied, bound + 1, static_cast<int32_t>(tied), out + count, nullptr);
  }
}

// Writes the lower half of each key to its rank. Quadratic and without a branch: faster than a sort of so few.
TOKRED_CLONES void rank_few(const int64_t* keys, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < n; ++j) rank += keys[j] < keys[i];
    out[rank] = static_cast<int32_t>(keys[i]);
  }
}

// Sorts by the upper half of the keys, least significant byte first; each pass keeps the order of equal bytes. Returns
// the one of both buffers that holds the result.
int64_t* sort_many(int64_t* from, int64_t* to, int64_t n) {
  constexpr int kDigits = 4, kBuckets = 256;
  const auto digit = [](int64_t key, int d) {
    return (static_cast<uint64_t>(key) >> (32 + 8 * d) ^ (d == kDigits - 1 ? 0x80 : 0)) & 0xff;
  };
  std::array<std::array<int32_t, kBuckets>, kDigits> start{};
  for (int64_t i = 0; i < n; ++i) {
    for (int d = 0; d < kDigits; ++d) ++start[d][digit(from[i], d)];
  }
  for (int d = 0; d < kDigits; ++d) {
    if (start[d][digit(from[0], d)] == n) continue;  // all share this byte
    int32_t before = 0;
    for (int32_t& bucket : start[d]) before += std::exchange(bucket, before);
    for (int64_t i = 0; i < n; ++i) to[start[d][digit(from[i], d)]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

}  // namespace

template <typename T>
int64_t topk_ascending(const TopkRow<T>& row, int64_t k, int32_t* out, TopkScratch& scratch) {
  const int64_t n = row.num_tokens;
  const int64_t window = row.num_window();
  if (window > 0 && window <= k && window < n && !row.keep && !row.drop) {
    // All of both ends are kept, so the tokens between them are a row of their own.
    TopkRow<T> middle = row;
    middle.score += row.keep_before * row.stride;
    middle.num_tokens = static_cast<int32_t>(n - window);
    middle.keep_before = 0;
    middle.keep_from = INT32_MAX;
    for (int32_t i = 0; i < row.keep_before; ++i) out[i] = i;
    int32_t* between = out + row.keep_before;
    const int64_t count = topk_ascending(middle, k - window, between, scratch);
    for (int64_t i = 0; i < count; ++i) between[i] += row.keep_before;
    for (int32_t i = 0; i < n - row.keep_from; ++i) between[count + i] = row.keep_from + i;
    return window + count;
  }
  const bool masked = row.keep || row.drop || window > 0;
  if (!masked && n >= 8 * kSample && k > 0 && k <= n / 4) {
    const int32_t pivot = guess_pivot(row, k);
    if (pivot > signed_key(kKeyNaN)) {
      const int64_t count = survivors(row, pivot, scratch);
      if (count >= k) {  // else the guess was too high: use the whole row
        take_largest(scratch.keys.data(), count, k, scratch.spare.data(), out);
        for (int64_t i = 0; i < k; ++i) out[i] = scratch.positions[out[i]];
        return k;
      }
    }
  }
  int32_t* keys = scratch.keys.data();
  plain_keys(row.score, row.stride, n, keys);
  const int64_t eligible = masked ? mask_keys(row, k, keys) : n;
  k = k < eligible ? k : eligible;
  if (k > 0) take_largest(keys, n, k, scratch.spare.data(), out);
  return k;
}

int64_t topk_rest(const int32_t* kept, int64_t count, int64_t num_tokens, TopkScratch& scratch) {
  int32_t* left = scratch.keys.data();
  std::fill_n(left, num_tokens, 1);
  for (int64_t i = 0; i < count; ++i) left[kept[i]] = 0;
  return compact(left, num_tokens, 1, 0, scratch.positions.data(), nullptr);
}

template <typename T>
void sort_by_score(const TopkRow<T>& row, int32_t* positions, int64_t count) {
  AlignedBuffer<int64_t> first(count), second(count);
  for (int64_t i = 0; i < count; ++i) {  // ascends where the score falls, then with the position
    const uint32_t key = ~score_key(static_cast<float>(row.score[positions[i] * row.stride]));
    first[i] = static_cast<int64_t>(uint64_t(signed_key(key)) << 32 | static_cast<uint32_t>(positions[i]));
  }
  if (count <= 256) return rank_few(first.data(), count, positions);
  int64_t* sorted = sort_many(first.data(), second.data(), count);
  for (int64_t i = 0; i < count; ++i) positions[i] = static_cast<int32_t>(sorted[i]);
}

template int64_t topk_ascending(const TopkRow<float>&, int64_t, int32_t*, TopkScratch&);
template int64_t topk_ascending(const TopkRow<c10::Half>&, int64_t, int32_t*, TopkScratch&);
template int64_t topk_ascending(const TopkRow<c10::BFloat16>&, int64_t, int32_t*, TopkScratch&);
template void sort_by_score(const TopkRow<float>&, int32_t*, int64_t);
template void sort_by_score(const TopkRow<c10::Half>&, int32_t*, int64_t);
template void sort_by_score(const TopkRow<c10::BFloat16>&, int32_t*, int64_t);

}  // namespace tokred
