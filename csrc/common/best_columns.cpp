// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/best_columns.h"

#include <algorithm>
#include <cstring>

#include "common/dot_panel.h"

namespace tokred {

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
