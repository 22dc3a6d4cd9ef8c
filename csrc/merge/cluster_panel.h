// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Pairs of tokens on the CPU: a block of rows meets columns panel by panel (common/dot_panel.h), and each panel of
// products is folded into what is wanted of it while it lies in the first-level cache. No matrix is stored.
#pragma once
#include <algorithm>

#include "common/best_columns.h"
#include "common/dot_panel.h"
#include "common/parallel.h"

namespace tokred {

// Rows 0, 1, ... of x or, by list, list[0], list[1], ...: what one side of the pairs is made of.
template <typename T>
struct ClusterRows {
  const T* x;
  int64_t stride;  // between rows, in elements
  const int32_t* list;
  int64_t dim;
  DType dtype;             // T
  bool normalize = false;  // to unit length: v / max(|v|, eps)
  float eps = 0.f;

  ClusterRows from(int64_t begin) const {
    return {list ? x : x + begin * stride, stride, list ? list + begin : nullptr, dim, dtype, normalize, eps};
  }
};

// product[r, j] = -max(row_square[r] + col_square[j] - 2 product[r, j], 0): minus the squared distance. NaN stays.
void panel_distances(int64_t rows, int64_t width, const float* row_square, const float* col_square, float* product);

constexpr int64_t padded_rows_of(int64_t rows) { return ceil_div(rows, int64_t{kDotRows}) * kDotRows; }

// Rows of a task: at most max_rows, split evenly so that 289 do not pay for 512. A multiple of the kDotRows rows that
// meet a panel together.
constexpr int64_t cluster_block_rows(int64_t count, int64_t max_rows) {
  const int64_t tasks = count < 1 ? 1 : ceil_div(count, max_rows);
  return padded_rows_of(ceil_div(count < 1 ? int64_t{1} : count, tasks));
}

// The first count rows to dst, as pack_units does.
template <typename T>
void pack_cluster_rows(const ClusterRows<T>& rows, int64_t count, int64_t padded_rows, int64_t padded_depth,
                       float filler, float* dst) {
  pack_units(rows.dtype, rows.x, rows.stride, rows.list, count, rows.dim, padded_rows, padded_depth, filler,
             rows.normalize, rows.eps, dst);
}

// Scratch of one thread for blocks of up to max_rows.
struct ClusterScratch {
  ClusterScratch(int64_t max_rows, int64_t dim)
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
void for_each_panel(const ClusterRows<T>& rows, int64_t count, const ClusterRows<T>& cols, int64_t num_cols,
                    ClusterScratch& s, Fold&& fold) {
  const int64_t stride = dot_stride(s.depth), padded = padded_rows_of(count);
  pack_cluster_rows(rows, count, padded, s.depth, 0.f, s.rows.data());
  for (int64_t col = 0; col < num_cols;) {
    const int64_t width = num_cols - col > kVecLanes ? dot_columns() : kVecLanes;
    pack_cluster_rows(cols.from(col), std::min(width, num_cols - col), width, s.depth, __builtin_nanf(""),
                      s.cols.data());
    transpose_panel(s.cols.data(), stride, width, s.depth, s.panel.data());
    dot_panel(s.rows.data(), stride, padded, s.depth, s.panel.data(), width, s.product.data());
    fold(s.product.data(), width, col);
    col += width;
  }
}

// square[i] = row i times itself.
template <typename T>
void squares_of_rows(const ClusterRows<T>& rows, int64_t count, ClusterScratch& s, float* square) {
  for (int64_t i = 0; i < count; i += kVecLanes) {
    float out[kVecLanes];
    const int64_t here = std::min<int64_t>(count - i, kVecLanes);
    pack_cluster_rows(rows.from(i), here, kVecLanes, s.depth, 0.f, s.cols.data());
    transpose_panel(s.cols.data(), dot_stride(s.depth), kVecLanes, s.depth, s.panel.data());
    square_columns(s.panel.data(), kVecLanes, s.depth, out);  // with the bits of dot_panel: equal rows have distance 0
    std::memcpy(square + i, out, static_cast<size_t>(here) * sizeof(float));
  }
}

}  // namespace tokred
