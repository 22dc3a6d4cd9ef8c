// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Dot products of a few queries with rows of a cache, named by their offsets, for the CPU kernels. A row that is loaded
// serves four queries from registers. A product's bits depend on its query and row alone (and on the instruction set).
#pragma once
#include <cstring>

#include "common/vec16.h"

namespace tokred {

constexpr int64_t kKeyBlock = 16;   // rows that stay in the first-level cache while all queries use them
constexpr int64_t kAhead = 32;      // rows between a prefetch and its use
constexpr int64_t kBf16Ahead = 64;  // the same where rows are not widened (common/dot_bf16.h) and so come faster
constexpr int64_t kDotPadding = kKeyBlock + kBf16Ahead;  // offsets past the last one, of rows that are read in vain

// Into the second-level cache: rows that wait in the first level for their turn hold up the loads of those in work.
TOKRED_INLINE void prefetch(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(row) + b, 0, 2);
}

// score[r][i] = q[r] . k row i for i in [begin, end); writes up to 7 more. offset has kDotPadding entries past
// the last. q: [kRows, q_stride] as load_query leaves it.
template <typename T, int kRows>
TOKRED_CLONES void dot_rows(const T* k, const int64_t* offset, int64_t begin, int64_t end, const float* q,
                            int64_t q_stride, int64_t dim, bool fetch, float* score, int64_t score_stride) {
  constexpr int kKeys = kRows == 1 ? 8 : 4;
  constexpr int kSums = kRows * kKeys;
  for (int64_t i = begin; i < end; i += kKeys) {
    const T* row[kKeys];
    for (int j = 0; j < kKeys; ++j) {
      row[j] = k + offset[i + j];
      if (fetch) prefetch(k + offset[i + j + kAhead], dim * static_cast<int64_t>(sizeof(T)));
    }
    Vec16 sum[kSums] = {};  // [kRows, kKeys]
    int64_t c = 0;
    for (; c + 2 * kVecLanes <= dim; c += 2 * kVecLanes) {
      Vec16 low[kKeys], high[kKeys];
#pragma GCC unroll 8
      for (int j = 0; j < kKeys; ++j) load32(row[j] + c, low[j], high[j]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Vec16 query_low, query_high;
        load16(q + r * q_stride + c, query_low);
        load16(q + r * q_stride + c + kVecLanes, query_high);
#pragma GCC unroll 8
        for (int j = 0; j < kKeys; ++j) sum[r * kKeys + j] += query_low * low[j];
#pragma GCC unroll 8
        for (int j = 0; j < kKeys; ++j) sum[r * kKeys + j] += query_high * high[j];
      }
    }
    for (; c < dim; c += kVecLanes) {  // at most twice
#pragma GCC unroll 8
      for (int j = 0; j < kKeys; ++j) {
        Vec16 key;
        if (c + kVecLanes <= dim) {
          load16(row[j] + c, key);
        } else {
          load_part(row[j] + c, dim - c, key);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          Vec16 query;
          load16(q + r * q_stride + c, query);
          sum[r * kKeys + j] += query * key;
        }
      }
    }
    float sums[kSums];
#pragma GCC unroll 2
    for (int s = 0; s < kSums; s += 8) sum_lanes8(sum + s, sums + s);
    for (int r = 0; r < kRows; ++r) std::memcpy(score + r * score_stride + i, sums + r * kKeys, kKeys * sizeof(float));
  }
}

// q[0, dim) in the order that dot_rows wants it in. What follows to the next multiple of 16 must be zeros.
template <typename T>
void arrange_query(int64_t dim, float* q) {
  if constexpr (kDeinterleaves<T>) {
    for (int64_t c = 0; c + 32 <= dim; c += 32) deinterleave32(q + c);
  }
}

// out = scale * q[0, dim) as dot_rows wants it. What follows to the next multiple of 16 must be zeros.
template <typename T>
TOKRED_CLONES void load_query(const T* q, int64_t dim, float scale, float* out) {
  for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<float>(q[i]) * scale;
  arrange_query<T>(dim, out);
}

}  // namespace tokred
