// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/dot_panel.h"

#include <algorithm>

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

template <typename T>
TOKRED_CLONES void pack_rows(const T* src, int64_t stride_row, const int32_t* list, int64_t rows, int64_t depth,
                             int64_t padded_rows, int64_t padded_depth, float filler, bool normalize, float eps,
                             float* dst, float* squares) {
  const int64_t stride = dot_stride(padded_depth);
  for (int64_t i = 0; i < rows; i += 8) {
    Vec16 square[8];
    for (int64_t j = 0; j < 8; ++j) {
      square[j] = Vec16{};
      if (i + j >= rows) continue;
      const T* row = src + (list ? int64_t{list[i + j]} : i + j) * stride_row;
      float* out = dst + (i + j) * stride;
      Vec16 sum = {};
      for (int64_t c = 0; c < padded_depth; c += kVecLanes) {
        Vec16 value;
        if (c + kVecLanes <= depth) {
          load16(row + c, value);
        } else {
          load_part(row + c, std::max<int64_t>(depth - c, 0), value);
        }
        store16(out + c, value);
        sum += value * value;
      }
      square[j] = sum;
    }
    if (!normalize && !squares) continue;
    float sums[8];
    sum_lanes8(square, sums);
    for (int64_t j = 0; j < 8 && i + j < rows; ++j) {
      if (squares) squares[i + j] = sums[j];
      if (!normalize) continue;
      const float norm = __builtin_sqrtf(sums[j]);
      const float scale = 1.f / (norm < eps ? eps : norm);  // a NaN norm stays NaN
      float* out = dst + (i + j) * stride;
      for (int64_t c = 0; c < padded_depth; c += kVecLanes) {
        Vec16 value;
        load16(out + c, value);
        store16(out + c, value * scale);
      }
    }
  }
  std::fill(dst + rows * stride, dst + padded_rows * stride, filler);
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

TOKRED_CLONES void square_columns(const float* panel, int64_t width, int64_t depth, float* squares) {
  for (int64_t j = 0; j < width; j += kVecLanes) {
    Vec16 total = {};
    for (int64_t begin = 0; begin < depth; begin += kDotDepth) {
      const int64_t end = begin + kDotDepth < depth ? begin + kDotDepth : depth;
      Vec16 sum = {};
      for (int64_t c = begin; c < end; ++c) {
        Vec16 value;
        load16(panel + c * width + j, value);
        sum += value * value;
      }
      total += sum;
    }
    store16(squares + j, total);
  }
}

void pack_units(DType dtype, const void* src, int64_t stride_row, const int32_t* list, int64_t rows, int64_t depth,
                int64_t padded_rows, int64_t padded_depth, float filler, bool normalize, float eps, float* dst,
                float* squares) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    pack_rows(static_cast<const T*>(src), stride_row, list, rows, depth, padded_rows, padded_depth, filler, normalize,
              eps, dst, squares);
  });
}

void dot_panel(const float* a, int64_t stride_row, int64_t rows, int64_t depth, const float* panel, int64_t width,
               float* out) {
  const auto product = width == kVecLanes ? dot_rows<1> : dot_rows<2>;
  product(a, stride_row, rows, depth, panel, out);
}

}  // namespace tokred
