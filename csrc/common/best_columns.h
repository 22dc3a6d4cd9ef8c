// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// The best column of each row, folded from panels of values (common/dot_panel.h) as they come, for CPU kernels.
#pragma once
#include <cstdint>

#include "common/vec16.h"

namespace tokred {

// Rows that the lanes below have room for.
constexpr int64_t padded_lanes_of(int64_t rows) { return ceil_div(rows, int64_t{kVecLanes}) * kVecLanes; }

// Kept as lanes: within a lane columns ascend and only a larger value replaces, so ties stay with the lowest; a lane is
// NaN until the first number, and NaN, in the data and in the panel's padding, is passed over. best and best_col:
// kVecLanes per row of padded_lanes_of(rows); start_best before the first panel.
void start_best(int64_t rows, float* best, int32_t* best_col);
void fold_best(const float* value, int64_t rows, int64_t width, int32_t first_col, float* best, int32_t* best_col);
// The best of each row's lanes, the lowest column among equals; NaN and column -1 where every lane is NaN. Writes
// padded_lanes_of(rows) of both.
void best_of_lanes(const float* best, const int32_t* best_col, int64_t rows, float* value_out, int32_t* col);

}  // namespace tokred
