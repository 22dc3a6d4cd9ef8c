// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A row is read by vector loops and never sorted. Long rows are first cut down: a strided sample gives a pivot below
// which nothing can matter (checked by counting, with the whole row as fallback), and one pass over the scores writes
// its survivors, in order. The k-th key is then searched (topk_search.h), and a last pass writes the positions, already
// in order.
#include "common/topk.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "common/topk_search.h"

namespace tokred {
namespace {

constexpr int32_t kExcluded = INT32_MIN;

template <typename T>
TOKRED_CLONES void plain_keys(const T* score, int64_t stride, int64_t n, int32_t* keys) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) keys[i] = signed_key(score_key(static_cast<float>(score[i])));
  } else {
    for (int64_t i = 0; i < n; ++i) keys[i] = signed_key(score_key(static_cast<float>(score[i * stride])));
  }
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
      count = reaching_scores(row.score, row.num_tokens, bound, positions);
      for (int64_t i = 0; i < count; ++i) keys[i] = signed_key(score_key(row.score[positions[i]]));
      return count;
    }
  }
  constexpr int64_t kPiece = 2048;  // others are converted piece by piece in the first-level cache
  alignas(64) int32_t piece[kPiece];
  for (int64_t begin = 0; begin < row.num_tokens; begin += kPiece) {
    const int64_t n = row.num_tokens - begin < kPiece ? row.num_tokens - begin : kPiece;
    plain_keys(row.score + begin * row.stride, row.stride, n, piece);
    count += compact_keys(piece, n, pivot, static_cast<int32_t>(begin), positions + count, keys + count);
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
  const int64_t count = compact_keys(keys, tied, bound, 0, out, nullptr);
  if (tied < n && bound < INT32_MAX) {
    compact_keys(keys + tied, n - tied, bound + 1, static_cast<int32_t>(tied), out + count, nullptr);
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
  return compact_keys(left, num_tokens, 1, 0, scratch.positions.data(), nullptr);
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
