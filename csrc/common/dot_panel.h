// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Dot products of a few rows with a panel of others, for CPU kernels that use each product where it is made and keep
// none. A product's bits depend on its two rows alone, not on the tile, the panel or the thread (on the instruction
// set: without FMA products are rounded).
#pragma once
#include <cstdint>
#include <cstring>

#include "common/vec16.h"

namespace tokred {

constexpr int kDotRows = 6;  // of a tile: 6 x 32 sums are 12 of AVX-512's registers, 6 x 16 of AVX2's
constexpr int64_t kMaxDotColumns = 2 * kVecLanes;
constexpr int64_t kDotDepth = 256;  // products per running sum: short sums round less

// Columns of a panel that suit this machine.
inline int64_t dot_columns() {
#if defined(__x86_64__)
  static const bool wide = __builtin_cpu_supports("avx512f");
  return wide ? 2 * kVecLanes : kVecLanes;
#else
  return kVecLanes;
#endif
}

// The stride of rows of depth values (a multiple of 16) that are walked side by side: no power of two, which would put
// all of them into a few sets of the first-level cache.
inline int64_t dot_stride(int64_t depth) { return depth + kVecLanes; }

// dst[i, 0, padded_depth), at dot_stride(padded_depth): rows 0, 1, ... or, by list, list[0], list[1], ... of src,
// widened and, if asked, scaled to unit length. padded_depth is a multiple of 16; its padding is zero. Padding rows are
// filler. squares: of each row, before it is scaled; null: not wanted.
void pack_units(DType dtype, const void* src, int64_t stride_row, const int32_t* list, int64_t rows, int64_t depth,
                int64_t padded_rows, int64_t padded_depth, float filler, bool normalize, float eps, float* dst,
                float* squares = nullptr);

// panel[c, j] = rows[j, c]: width (16 or 32) rows of depth values, a multiple of 8, turned so that a column is
// contiguous.
void transpose_panel(const float* rows, int64_t stride_row, int64_t width, int64_t depth, float* panel);

// squares[j] = the sum of the squares of column j of a panel.
void square_columns(const float* panel, int64_t width, int64_t depth, float* squares);

// out[r, j] = row r of a, rows of them (a multiple of kDotRows) at stride_row, times column j of the panel; out is
// [rows, width].
void dot_panel(const float* a, int64_t stride_row, int64_t rows, int64_t depth, const float* panel, int64_t width,
               float* out);

}  // namespace tokred
