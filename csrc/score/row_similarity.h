// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include <cmath>

#include "common/dispatch.h"

namespace tokred {

// Rows of x or y: [size[0], size[1], size[2], dim] by strides, last dim contiguous; y may repeat rows by strides of 0.
struct RowsAt {
  const void* data;
  int64_t stride[3];  // in elements
};

struct RowSimilarityArgs {
  RowsAt x, y;
  int64_t size[3], dim;
  // [size[0], size[1], size[2]] each, contiguous; null: not wanted.
  float* cosine;
  float* dot;
  float* l2;
  float* norm_ratio;
  DType dtype;

  int64_t num_rows() const { return size[0] * size[1] * size[2]; }
  TOKRED_HOST_DEVICE int64_t offset(const RowsAt& rows, int64_t row) const {
    if (row < size[2]) return row * rows.stride[2];  // dense tensors are one run of rows, and divisions are slow
    const int64_t outer = row / size[2];
    return outer / size[1] * rows.stride[0] + outer % size[1] * rows.stride[1] + row % size[2] * rows.stride[2];
  }
};

// What a pass over two rows adds up; all that is asked for follows from it.
struct RowSums {
  float xy, xx, yy, dd;  // x . y, |x|^2, |y|^2, |x - y|^2
};

constexpr float kLeastNorm = 1e-12f;  // as in torch.nn.functional.normalize

TOKRED_HOST_DEVICE void write_similarity(const RowSimilarityArgs& a, int64_t row, const RowSums& sums) {
  const float norm_x = sqrtf(sums.xx), norm_y = sqrtf(sums.yy);
  const float least_x = norm_x < kLeastNorm ? kLeastNorm : norm_x;  // NaN stays
  const float least_y = norm_y < kLeastNorm ? kLeastNorm : norm_y;
  if (a.cosine) a.cosine[row] = sums.xy / least_x / least_y;  // one after the other: their product could overflow
  if (a.dot) a.dot[row] = sums.xy;
  if (a.l2) a.l2[row] = sqrtf(sums.dd);
  if (a.norm_ratio) a.norm_ratio[row] = norm_x / least_y;
}

constexpr int kRowSimilarityThreads = 256;

// log2 of how many lanes of a warp share a pair of rows: the fewest that cover it by one load each.
constexpr int row_similarity_lanes_log2(int64_t dim, int64_t bytes_of_element) {
  int log2 = 0;
  while (log2 < 5 && (int64_t{16} << log2) < dim * bytes_of_element) ++log2;
  return log2;
}

void row_similarity_cpu(const RowSimilarityArgs& args);
int row_similarity_cuda(const RowSimilarityArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
