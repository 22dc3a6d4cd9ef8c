// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/pair_panel.h"

namespace tokred {
namespace {

// Eight rows at a time.
template <typename T>
TOKRED_CLONES void pack_units(const T* src, int64_t stride_row, const int32_t* list, int64_t rows, int64_t depth,
                              int64_t padded_rows, int64_t padded_depth, float filler, bool normalize, float eps,
                              float* dst) {
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
    if (!normalize) continue;
    float squares[8];
    sum_lanes8(square, squares);
    for (int64_t j = 0; j < 8 && i + j < rows; ++j) {
      const float norm = __builtin_sqrtf(squares[j]);
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

}  // namespace

template <typename T>
void pack_pair_rows(const PairRows<T>& rows, int64_t count, int64_t padded_rows, int64_t padded_depth, float filler,
                    float* dst) {
  pack_units(rows.x, rows.stride, rows.list, count, rows.dim, padded_rows, padded_depth, filler, rows.normalize,
             rows.eps, dst);
}
template void pack_pair_rows(const PairRows<float>&, int64_t, int64_t, int64_t, float, float*);
template void pack_pair_rows(const PairRows<c10::Half>&, int64_t, int64_t, int64_t, float, float*);
template void pack_pair_rows(const PairRows<c10::BFloat16>&, int64_t, int64_t, int64_t, float, float*);

// The order of operations of dot_panel.
TOKRED_CLONES void panel_squares(const float* panel, int64_t depth, int64_t width, float* out) {
  for (int64_t j = 0; j < width; j += kVecLanes) {
    for (int64_t begin = 0; begin < depth; begin += kDotDepth) {
      const int64_t end = begin + kDotDepth < depth ? begin + kDotDepth : depth;
      Vec16 sum = {};
      for (int64_t c = begin; c < end; ++c) {
        Vec16 column;
        load16(panel + c * width + j, column);
        sum += column * column;
      }
      if (begin > 0) {
        Vec16 before;
        load16(out + j, before);
        sum += before;
      }
      store16(out + j, sum);
    }
  }
}

TOKRED_CLONES void panel_distances(int64_t rows, int64_t width, const float* row_square, const float* col_square,
                                   float* product) {
  for (int64_t i = 0; i < rows; ++i) {
    const float square = row_square[i];
    float* value = product + i * width;
    for (int64_t j = 0; j < width; ++j) {
      const float negative = 2.f * value[j] - (square + col_square[j]);
      value[j] = negative > 0.f ? 0.f : negative;
    }
  }
}

void start_best(int64_t rows, float* best, int32_t* best_col) {
  std::fill_n(best, padded_lanes_of(rows) * kVecLanes, __builtin_nanf(""));
  std::fill_n(best_col, padded_lanes_of(rows) * kVecLanes, 0);
}

TOKRED_CLONES void fold_best(const float* value, int64_t rows, int64_t width, int32_t first_col, float* best,
                             int32_t* best_col) {
  for (int64_t i = 0; i < rows; ++i) {
    float* lane = best + i * kVecLanes;
    int32_t* at = best_col + i * kVecLanes;
    for (int32_t j = 0; j < width; j += kVecLanes) {
      const float* c = value + i * width + j;
      const int32_t column = first_col + j;
#pragma GCC unroll 1
      for (int l = 0; l < kVecLanes; ++l) {
        const int32_t larger = -(int32_t{c[l] == c[l]} & int32_t{!(c[l] <= lane[l])});  // bits: no branch
        at[l] = (at[l] & ~larger) | ((column + l) & larger);
        lane[l] = larger ? c[l] : lane[l];
      }
    }
  }
}

// The lanes of 16 rows are turned so that a comparison serves all of them.
TOKRED_CLONES void best_of_lanes(const float* best, const int32_t* best_col, int64_t rows, float* value_out,
                                 int32_t* col) {
  alignas(64) float lane[kVecLanes * kVecLanes], at_bits[kVecLanes * kVecLanes];
  for (int64_t i = 0; i < rows; i += kVecLanes) {
    transpose_panel(best + i * kVecLanes, kVecLanes, kVecLanes, kVecLanes, lane);
    transpose_panel(reinterpret_cast<const float*>(best_col + i * kVecLanes), kVecLanes, kVecLanes, kVecLanes, at_bits);
    int32_t at[kVecLanes * kVecLanes];
    std::memcpy(at, at_bits, sizeof(at));
    for (int l = 0; l < kVecLanes; ++l) {
      value_out[i + l] = __builtin_nanf("");
      col[i + l] = -1;
    }
    for (int k = 0; k < kVecLanes; ++k) {
      const float* value = lane + k * kVecLanes;
#pragma GCC unroll 1
      for (int l = 0; l < kVecLanes; ++l) {
        const int32_t lower = int32_t{value[l] == value_out[i + l]} & int32_t{at[k * kVecLanes + l] < col[i + l]};
        const int32_t larger = int32_t{value[l] == value[l]} & int32_t{!(value[l] <= value_out[i + l])};
        const int32_t wins = -(lower | larger);  // bits: no branch
        col[i + l] = (col[i + l] & ~wins) | (at[k * kVecLanes + l] & wins);
        value_out[i + l] = wins ? value[l] : value_out[i + l];
      }
    }
  }
}

}  // namespace tokred
