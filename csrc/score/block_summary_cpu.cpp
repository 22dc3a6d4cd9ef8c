// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Blocks are shared out over the threads. A block's rows are walked once per panel of 64 columns, which stay in
// registers; the second panel finds them in the first-level cache.
#include "score/block_summary.h"

#include <limits>

#include "common/vec16.h"

namespace tokred {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Up to 16 kCols columns of a row; part: those of a last vector that is not whole (kCols 1), 0 where all are.
template <typename T, int kCols>
TOKRED_INLINE void load_columns(const T* row, int64_t part, Vec16 (&x)[kCols]) {
#pragma GCC unroll 4
  for (int c = 0; c < kCols; ++c) part == 0 ? load16(row + c * kVecLanes, x[c]) : load_part(row, part, x[c]);
}

template <typename T, int kCols>
TOKRED_INLINE void add_rows(const T* rows, int64_t stride, int64_t count, int64_t part, float* mean) {
  Vec16 sum[kCols] = {};
  for (int64_t i = 0; i < count; ++i) {
    Vec16 x[kCols];
    load_columns<T, kCols>(rows + i * stride, part, x);
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) sum[c] += x[c];
  }
#pragma GCC unroll 4
  for (int c = 0; c < kCols; ++c) store16(mean + c * kVecLanes, sum[c] / static_cast<float>(count));
}

// By plain floats: a choice between vectors would be taken apart into single values before a clone sees it.
template <typename T, int kCols>
TOKRED_INLINE void bound_rows(const T* rows, int64_t stride, int64_t count, int64_t part, float* low, float* high) {
  constexpr int kWidth = kCols * kVecLanes;
  for (int j = 0; j < kWidth; ++j) {
    low[j] = kInf;
    high[j] = -kInf;
  }
  for (int64_t i = 0; i < count; ++i) {
    Vec16 x[kCols];
    load_columns<T, kCols>(rows + i * stride, part, x);
    float value[kWidth];
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) store16(value + c * kVecLanes, x[c]);
    for (int j = 0; j < kWidth; ++j) {  // NaN replaces a number, and no number replaces NaN
      const float v = value[j];
      const float least = v < low[j] ? v : low[j], greatest = v > high[j] ? v : high[j];
      low[j] = v == v ? least : v;
      high[j] = v == v ? greatest : v;
    }
  }
}

template <typename T, bool kMinMax>
TOKRED_CLONES void reduce_block(const T* rows, int64_t stride, int64_t count, int64_t dim, T* low, T* high) {
  float least[4 * kVecLanes], greatest[4 * kVecLanes];
  for (int64_t c = 0; c < dim;) {
    const bool wide = dim - c >= 4 * kVecLanes;
    const int64_t columns = wide ? 4 * kVecLanes : std::min<int64_t>(dim - c, kVecLanes), part = columns % kVecLanes;
    if constexpr (kMinMax) {
      wide ? bound_rows<T, 4>(rows + c, stride, count, part, least, greatest)
           : bound_rows<T, 1>(rows + c, stride, count, part, least, greatest);
      for (int64_t j = 0; j < columns; ++j) high[c + j] = T(greatest[j]);
    } else {
      wide ? add_rows<T, 4>(rows + c, stride, count, part, least)
           : add_rows<T, 1>(rows + c, stride, count, part, least);
    }
    for (int64_t j = 0; j < columns; ++j) low[c + j] = T(least[j]);
    c += columns;
  }
}

template <typename T>
void summarize(const BlockSummaryArgs& a, int64_t row) {
  const int64_t block_idx = row % a.num_blocks, head = row / a.num_blocks % a.num_heads;
  const int64_t batch_idx = row / a.num_blocks / a.num_heads;
  const TokenSpan span = a.block(batch_idx, block_idx);
  const T* rows = static_cast<const T*>(a.k) + batch_idx * a.k_batch + head * a.k_head + span.begin * a.k_token;
  T* low = static_cast<T*>(a.low) + row * a.dim;
  T* high = a.high ? static_cast<T*>(a.high) + row * a.dim : nullptr;
  if (span.len == 0) {
    for (T* out : {low, high}) {
      if (out) std::memset(static_cast<void*>(out), 0, static_cast<size_t>(a.dim) * sizeof(T));
    }
  } else if (high) {
    reduce_block<T, true>(rows, a.k_token, span.len, a.dim, low, high);
  } else {
    reduce_block<T, false>(rows, a.k_token, span.len, a.dim, low, high);
  }
}

}  // namespace

void block_summary_cpu(const BlockSummaryArgs& a) {
  const int64_t bytes = std::min(a.block_size, a.kv_len) * a.dim * element_size(a.dtype);
  parallel_for(a.num_rows(), 1 + (int64_t{256} << 10) / (bytes + 64), [&](int64_t begin, int64_t end) {
    dispatch_float(a.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t row = begin; row < end; ++row) summarize<T>(a, row);
    });
  });
}

}  // namespace tokred
