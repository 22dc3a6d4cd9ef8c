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
    const int64_t inner = row / size[2];
    return inner / size[1] * rows.stride[0] + inner % size[1] * rows.stride[1] + row % size[2] * rows.stride[2];
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

// Lanes of a warp that share a pair of rows: the least power of two that covers them by one load each.
constexpr int row_similarity_lanes(int64_t dim, int64_t bytes_of_element) {
  int lanes = 1;
  while (lanes < 32 && lanes * 16 < dim * bytes_of_element) lanes *= 2;
  return lanes;
}

void row_similarity_cpu(const RowSimilarityArgs& args);
int row_similarity_cuda(const RowSimilarityArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
