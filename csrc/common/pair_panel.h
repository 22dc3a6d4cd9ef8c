// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Pairs of tokens on the CPU: a block of rows meets columns panel by panel (common/dot_panel.h), and each panel of
// products is folded into what is wanted of it while it lies in the first-level cache. No matrix is stored.
#pragma once
#include "common/dot_panel.h"
#include "common/parallel.h"

namespace tokred {

// Rows 0, 1, ... of x or, by list, list[0], list[1], ...: what one side of the pairs is made of.
template <typename T>
struct PairRows {
  const T* x;
  int64_t stride;  // between rows, in elements
  const int32_t* list;
  int64_t dim;
  bool normalize = false;  // to unit length: v / max(|v|, eps)
  float eps = 0.f;

  PairRows from(int64_t begin) const {
    return {list ? x : x + begin * stride, stride, list ? list + begin : nullptr, dim, normalize, eps};
  }
};

// The first count rows, widened and, if asked, scaled to unit length, to dst at dot_stride(padded_depth). padded_depth
// is a multiple of kVecLanes; its padding is zero. Padding rows are filler.
template <typename T>
void pack_pair_rows(const PairRows<T>& rows, int64_t count, int64_t padded_rows, int64_t padded_depth, float filler,
                    float* dst);

// out[j] = column j of the panel times itself, with the very bits that dot_panel gives for a row with its like: the
// distance of equal rows is exactly 0.
void panel_squares(const float* panel, int64_t depth, int64_t width, float* out);

// product[r, j] = -max(row_square[r] + col_square[j] - 2 product[r, j], 0): minus the squared distance. NaN stays.
void panel_distances(int64_t rows, int64_t width, const float* row_square, const float* col_square, float* product);

// The best column of each row, as lanes: within a lane columns ascend and only a larger value replaces, so ties stay
// with the lowest; a lane is NaN until the first number, and NaN, in the data and in the panel's padding, is passed
// over. best and best_col: kVecLanes per row; start_best before the first panel.
void start_best(int64_t rows, float* best, int32_t* best_col);
void fold_best(const float* value, int64_t rows, int64_t width, int32_t first_col, float* best, int32_t* best_col);
// The best of each row's lanes, the lowest column among equals; NaN and column -1 where every lane is NaN. Writes
// multiples of kVecLanes rows, and reads as many.
void best_of_lanes(const float* best, const int32_t* best_col, int64_t rows, float* value, int32_t* col);

constexpr int64_t padded_rows_of(int64_t rows) { return ceil_div(rows, int64_t{kDotRows}) * kDotRows; }
constexpr int64_t padded_lanes_of(int64_t rows) { return ceil_div(rows, int64_t{kVecLanes}) * kVecLanes; }

// Rows of a task: at most max_rows, split evenly so that 289 do not pay for 512. A multiple of the kDotRows rows that
// meet a panel together.
constexpr int64_t pair_block_rows(int64_t count, int64_t max_rows) {
  const int64_t tasks = count < 1 ? 1 : ceil_div(count, max_rows);
  return padded_rows_of(ceil_div(count < 1 ? int64_t{1} : count, tasks));
}

// Scratch of one thread for blocks of up to max_rows.
struct PairScratch {
  PairScratch(int64_t max_rows, int64_t dim)
      : depth(dim < 1 ? int64_t{kVecLanes} : ceil_div<int64_t>(dim, kVecLanes) * kVecLanes),
        rows(padded_rows_of(max_rows) * dot_stride(depth)),
        cols(kMaxDotColumns * dot_stride(depth)),
        panel(kMaxDotColumns * depth),
        product(padded_rows_of(max_rows) * kMaxDotColumns) {}
  int64_t depth;
  AlignedBuffer<float> rows, cols, panel, product;
};

// fold(product [count, width], width, first column) for num_cols columns, ascending; columns past the end are NaN.
template <typename T, typename Fold>
void for_each_panel(const PairRows<T>& rows, int64_t count, const PairRows<T>& cols, int64_t num_cols, PairScratch& s,
                    Fold&& fold) {
  const int64_t stride = dot_stride(s.depth), padded = padded_rows_of(count);
  pack_pair_rows(rows, count, padded, s.depth, 0.f, s.rows.data());
  for (int64_t col = 0; col < num_cols;) {
    const int64_t width = num_cols - col > kVecLanes ? dot_columns() : kVecLanes;
    pack_pair_rows(cols.from(col), std::min(width, num_cols - col), width, s.depth, __builtin_nanf(""), s.cols.data());
    transpose_panel(s.cols.data(), stride, width, s.depth, s.panel.data());
    dot_panel(s.rows.data(), stride, padded, s.depth, s.panel.data(), width, s.product.data());
    fold(s.product.data(), width, col);
    col += width;
  }
}

// square[i] = row i times itself.
template <typename T>
void squares_of_rows(const PairRows<T>& rows, int64_t count, PairScratch& s, float* square) {
  for (int64_t i = 0; i < count; i += kVecLanes) {
    float out[kVecLanes];
    const int64_t here = std::min<int64_t>(count - i, kVecLanes);
    pack_pair_rows(rows.from(i), here, kVecLanes, s.depth, 0.f, s.cols.data());
    transpose_panel(s.cols.data(), dot_stride(s.depth), kVecLanes, s.depth, s.panel.data());
    panel_squares(s.panel.data(), s.depth, kVecLanes, out);
    std::memcpy(square + i, out, static_cast<size_t>(here) * sizeof(float));
  }
}

}  // namespace tokred
