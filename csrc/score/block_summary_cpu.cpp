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

// Columns [0, 16 kCols) of count rows; sums go to low. part: columns of a last vector that is not whole (kCols 1).
template <typename T, int kCols, bool kMinMax>
TOKRED_INLINE void reduce_panel(const T* rows, int64_t stride, int64_t count, int64_t part, Vec16* low, Vec16* high) {
#pragma GCC unroll 4
  for (int c = 0; c < kCols; ++c) {
    low[c] = kMinMax ? Vec16{} + kInf : Vec16{};
    high[c] = Vec16{} - kInf;
  }
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
      Vec16 x;
      if (part == 0) {
        load16(rows + i * stride + c * kVecLanes, x);
      } else {
        load_part(rows + i * stride, part, x);
      }
      if constexpr (kMinMax) {  // NaN replaces a number, and no number replaces NaN
        low[c] = (x < low[c]) | (x != x) ? x : low[c];
        high[c] = (x > high[c]) | (x != x) ? x : high[c];
      } else {
        low[c] += x;
      }
    }
  }
  if constexpr (!kMinMax) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) low[c] = low[c] / static_cast<float>(count);
  }
}

template <typename T>
TOKRED_INLINE void store_values(const Vec16* values, int64_t columns, T* out) {
  float lanes[4 * kVecLanes];
  std::memcpy(lanes, values, static_cast<size_t>(ceil_div(columns, int64_t{kVecLanes})) * sizeof(Vec16));
  for (int64_t c = 0; c < columns; ++c) out[c] = T(lanes[c]);
}

template <typename T, bool kMinMax>
TOKRED_CLONES void reduce_block(const T* rows, int64_t stride, int64_t count, int64_t dim, T* low, T* high) {
  Vec16 least[4], greatest[4];
  for (int64_t c = 0; c < dim;) {
    const int64_t columns = dim - c >= 64 ? 64 : std::min<int64_t>(dim - c, kVecLanes);
    if (columns == 64) {
      reduce_panel<T, 4, kMinMax>(rows + c, stride, count, 0, least, greatest);
    } else {
      reduce_panel<T, 1, kMinMax>(rows + c, stride, count, columns % kVecLanes, least, greatest);
    }
    store_values(least, columns, low + c);
    if constexpr (kMinMax) store_values(greatest, columns, high + c);
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
