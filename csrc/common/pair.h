// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Two sets of rows that are compared with each other, row by row: what the ops share that fold similarities as they
// come.
#pragma once
#include "common/ragged.h"

namespace tokred {

// Of vectors a and b: a b / (|a| |b|), a b, or -|a - b|^2.
enum class PairMetric : int8_t { kCosine, kDot, kL2 };
constexpr float kPairEps = 1e-12f;  // the smallest norm that a cosine divides by

struct PairInputs {
  const void* x;  // [batch_size, num_x, dim], or packed [num_x, dim]; last dim contiguous
  const void* y;  // [batch_size, num_y, dim], [num_y, dim] that all meet (strides 0 between batches), or packed
  const int32_t *cu_x, *cu_y;  // [batch_size + 1], both or none
  const uint8_t* drop_mask;    // a value per row of y: nobody meets it; null: none
  IndexPtr x_group, y_group;   // a value per row of x and of y, both or none
  int64_t batch_size, num_x, num_y, dim;
  int64_t stride_x_batch, stride_x, stride_y_batch, stride_y;  // in elements; 0 between batches when packed
  int64_t stride_y_list;  // between batches of what has a value per row of y: num_y, or 0 when shared or packed
  PairMetric metric;
  bool same_group;    // rows of one group meet; else those of different groups
  bool exclude_self;  // rows of one position do not meet
  DType dtype;

  TOKRED_HOST_DEVICE int64_t total_x() const { return cu_x ? num_x : batch_size * num_x; }
};

// The rows of one batch entry or packed sequence.
struct PairSequence {
  int64_t x, y;          // where its rows start, in elements
  int64_t x_row, y_row;  // and in lists of a value per row
  int64_t num_x, num_y;
};
TOKRED_HOST_DEVICE PairSequence pair_sequence(const PairInputs& in, int64_t batch) {
  const TokenSpan x = token_span(in.cu_x, in.num_x, in.num_x, batch);
  const TokenSpan y = token_span(in.cu_y, in.num_y, in.num_y, batch);
  return {batch * in.stride_x_batch + x.begin * in.stride_x,
          batch * in.stride_y_batch + y.begin * in.stride_y,
          x.begin + (in.cu_x ? 0 : batch * in.num_x),
          y.begin + batch * in.stride_y_list,
          x.len,
          y.len};
}

constexpr int kPairBlockX = 64, kPairBlockY = 128;  // of a CUDA block's tile
constexpr int kPairThreads = 128;                   // of the block

// Blocks of x. Packed: one for each full block of all rows and one for each sequence, so that sequence b can start at
// block cu_x[b] / kPairBlockX + b without a scan.
constexpr int64_t pair_x_blocks(const PairInputs& in) {
  if (in.batch_size == 0) return 0;
  return in.cu_x ? in.num_x / kPairBlockX + in.batch_size : in.batch_size * ceil_div(in.num_x, int64_t{kPairBlockX});
}
// Whether all rows can be loaded 16 bytes at a time.
inline bool pair_vector_loads(const PairInputs& in) {
  const uint64_t bytes = static_cast<uint64_t>(element_size(in.dtype));
  uint64_t all =
      reinterpret_cast<uint64_t>(in.x) | reinterpret_cast<uint64_t>(in.y) | static_cast<uint64_t>(in.dim) * bytes;
  for (const int64_t stride : {in.stride_x, in.stride_y, in.stride_x_batch, in.stride_y_batch})
    all |= static_cast<uint64_t>(stride) * bytes;
  return all % 16 == 0;
}

// Whether row i of x meets row j of y, both counted from the start of the sequence.
TOKRED_HOST_DEVICE bool pair_meets(const PairInputs& in, const PairSequence& s, int64_t i, int64_t j) {
  if (in.drop_mask && in.drop_mask[s.y_row + j]) return false;
  if (in.exclude_self && i == j) return false;
  return !in.x_group.data || (in.x_group[s.x_row + i] == in.y_group[s.y_row + j]) == in.same_group;
}

}  // namespace tokred
