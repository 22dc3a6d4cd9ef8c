// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/dot_panel.h"

namespace tokred {
namespace {

// rows[0, 8) at stride_row -> 8 columns at stride_col, by shuffles that are one instruction each.
TOKRED_INLINE void transpose8(const float* rows, int64_t stride_row, float* columns, int64_t stride_col) {
  Vec8 row[8], pair[8], quad[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) std::memcpy(&row[i], rows + i * stride_row, sizeof(Vec8));
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = __builtin_shuffle(row[i], row[i + 1], Vec8i{0, 8, 1, 9, 4, 12, 5, 13});
    pair[i + 1] = __builtin_shuffle(row[i], row[i + 1], Vec8i{2, 10, 3, 11, 6, 14, 7, 15});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      quad[i + 2 * j] = __builtin_shuffle(pair[i + j], pair[i + j + 2], Vec8i{0, 1, 8, 9, 4, 5, 12, 13});
      quad[i + 2 * j + 1] = __builtin_shuffle(pair[i + j], pair[i + j + 2], Vec8i{2, 3, 10, 11, 6, 7, 14, 15});
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec8 low = __builtin_shuffle(quad[i], quad[i + 4], Vec8i{0, 1, 2, 3, 8, 9, 10, 11});
    const Vec8 high = __builtin_shuffle(quad[i], quad[i + 4], Vec8i{4, 5, 6, 7, 12, 13, 14, 15});
    std::memcpy(columns + i * stride_col, &low, sizeof(low));
    std::memcpy(columns + (i + 4) * stride_col, &high, sizeof(high));
  }
}

// kept apart from its callers: inlined, its sums would compete with theirs for registers.
template <int kVecs>
TOKRED_CLONES void dot_rows(const float* a, int64_t stride_row, int64_t rows, int64_t depth, const float* panel,
                            float* out) {
  for (int64_t begin = 0; begin < depth; begin += kDotDepth) {
    const int64_t end = begin + kDotDepth < depth ? begin + kDotDepth : depth;
    for (int64_t i = 0; i < rows; i += kDotRows) {
      Vec16 sum[kDotRows][kVecs] = {};
      const float* row = a + i * stride_row;
      for (int64_t c = begin; c < end; ++c) {
        Vec16 column[kVecs];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) load16(panel + (c * kVecs + v) * kVecLanes, column[v]);
#pragma GCC unroll 8
        for (int r = 0; r < kDotRows; ++r) {
          const float value = row[r * stride_row + c];
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) sum[r][v] += column[v] * value;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kDotRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          float* to = out + ((i + r) * kVecs + v) * kVecLanes;
          if (begin > 0) {
            Vec16 before;
            load16(to, before);
            sum[r][v] += before;
          }
          store16(to, sum[r][v]);
        }
      }
    }
  }
}

}  // namespace

TOKRED_CLONES void transpose_panel(const float* rows, int64_t stride_row, int64_t width, int64_t depth, float* panel) {
  for (int64_t c = 0; c < depth; c += 8) {
    for (int64_t j = 0; j < width; j += 8)
      transpose8(rows + j * stride_row + c, stride_row, panel + c * width + j, width);
  }
}

void dot_panel(const float* a, int64_t stride_row, int64_t rows, int64_t depth, const float* panel, int64_t width,
               float* out) {
  const auto product = width == kVecLanes ? dot_rows<1> : dot_rows<2>;
  product(a, stride_row, rows, depth, panel, out);
}

}  // namespace tokred
