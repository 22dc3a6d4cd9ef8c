// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/pair_panel.h"

#include <algorithm>
#include <limits>

namespace tokred {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kBlockBytes = 2 << 20;  // of x: each float read, from L2 or L3, enters 16 or 32 products
constexpr int64_t kTasks = 16;            // so many are enough, blocks or shares of y
constexpr int64_t kShareRows = 512;

int64_t padded_depth(const PairInputs& in) {
  return std::max<int64_t>(ceil_div<int64_t>(in.dim, kVecLanes), 1) * kVecLanes;
}

// Products to similarities, in place.
TOKRED_CLONES void finish_scaled(float* value, int64_t rows, int64_t width, const float* scale, const float* bias) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) value[i * width + j] = value[i * width + j] * scale[j] + bias[j];
  }
}
TOKRED_CLONES void finish_l2(float* value, int64_t rows, int64_t width, const float* x_square, const float* y_square,
                             const float* bias) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const float distance = (x_square[i] + y_square[j]) - 2.f * value[i * width + j];
      // max(distance, 0) by bits, so that NaN stays and no clone branches: a number with a sign becomes 0
      int32_t bits;
      std::memcpy(&bits, &distance, sizeof(bits));
      const int32_t is_nan = -static_cast<int32_t>((bits & INT32_MAX) > 0x7f800000);
      bits &= ~(bits >> 31) | is_nan;
      float clamped;
      std::memcpy(&clamped, &bits, sizeof(clamped));
      value[i * width + j] = bias[j] - clamped;
    }
  }
}
// NaN where the groups forbid.
TOKRED_CLONES void mask_groups(float* value, int64_t rows, int64_t width, const int64_t* x_group,
                               const int64_t* y_group, bool same) {
  int32_t* bits = reinterpret_cast<int32_t*>(value);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) bits[i * width + j] |= (x_group[i] == y_group[j]) == same ? 0 : 0x7fc00000;
  }
}

// Clears pairs that the groups forbid.
TOKRED_CLONES void keep_groups(int32_t* meets, int64_t rows, int64_t width, const int64_t* x_group,
                               const int64_t* y_group, bool same) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) meets[i * width + j] &= (x_group[i] == y_group[j]) == same ? -1 : 0;
  }
}

}  // namespace

int64_t pair_block_rows(const PairInputs& in) {
  const int64_t fit = std::clamp<int64_t>(kBlockBytes / (4 * dot_stride(padded_depth(in))), 48, 1024);
  const int64_t longest = std::max<int64_t>(in.num_x, 1);
  return ceil_div(ceil_div(longest, ceil_div(longest, fit)), int64_t{kDotRows}) * kDotRows;
}

std::vector<PairBlock> pair_blocks(const PairInputs& in) {
  std::vector<PairBlock> blocks;
  const int64_t rows = pair_block_rows(in);
  for (int64_t batch = 0; batch < in.batch_size; ++batch) {
    const int64_t num_x = pair_sequence(in, batch).num_x;
    for (int64_t begin = 0; begin < num_x; begin += rows)
      blocks.push_back({batch, begin, std::min(begin + rows, num_x)});
  }
  return blocks;
}

int64_t pair_shares(int64_t num_blocks, int64_t num_y) {
  if (num_blocks == 0) return 1;
  return std::max<int64_t>(std::min(ceil_div(kTasks, num_blocks), num_y / kShareRows), 1);
}

PairPanels::PairPanels(const PairInputs& in)
    : in_(in),
      depth_(padded_depth(in)),
      x_(pair_block_rows(in) * dot_stride(depth_)),
      x_square_(pair_block_rows(in)),
      y_(kMaxDotColumns * dot_stride(depth_)),
      panel_(kMaxDotColumns * depth_),
      value_(pair_block_rows(in) * kMaxDotColumns),
      x_group_(in.x_group.data ? pair_block_rows(in) : 0),
      meets_(pair_block_rows(in) * kMaxDotColumns) {}

void PairPanels::pack_x(const PairSequence& s, int64_t begin, int64_t end) {
  rows_ = end - begin;
  begin_ = begin;
  const int64_t padded = ceil_div(rows_, int64_t{kDotRows}) * kDotRows;
  const char* x = static_cast<const char*>(in_.x) + (s.x + begin * in_.stride_x) * element_size(in_.dtype);
  pack_units(in_.dtype, x, in_.stride_x, nullptr, rows_, in_.dim, padded, depth_, 0.f,
             in_.metric == PairMetric::kCosine, kPairEps, x_.data(), x_square_.data());
  if (!in_.x_group.data) return;
  for (int64_t i = 0; i < rows_; ++i) x_group_[i] = in_.x_group[s.x_row + begin + i];
}

const float* PairPanels::meet(const PairSequence& s, int64_t first, int64_t count, const float* bias) {
  const int64_t width = dot_columns(), padded = ceil_div(rows_, int64_t{kDotRows}) * kDotRows;
  const char* y = static_cast<const char*>(in_.y) + (s.y + first * in_.stride_y) * element_size(in_.dtype);
  if (in_.dtype == DType::kF32 && count == width && in_.dim == depth_) {  // as they are
    transpose_panel(reinterpret_cast<const float*>(y), in_.stride_y, width, depth_, panel_.data());
  } else {
    pack_units(in_.dtype, y, in_.stride_y, nullptr, count, in_.dim, width, depth_, 0.f, false, 0.f, y_.data());
    transpose_panel(y_.data(), dot_stride(depth_), width, depth_, panel_.data());
  }
  dot_panel(x_.data(), dot_stride(depth_), padded, depth_, panel_.data(), width, value_.data());

  float term[kMaxDotColumns] = {}, add[kMaxDotColumns] = {};
  if (in_.metric != PairMetric::kDot) square_columns(panel_.data(), width, depth_, term);
  for (int64_t j = 0; j < width; ++j) {
    if (in_.metric != PairMetric::kL2) {
      const float norm = __builtin_sqrtf(term[j]);
      term[j] = in_.metric == PairMetric::kDot ? 1.f : 1.f / (norm < kPairEps ? kPairEps : norm);
    }
    if (bias && j < count) add[j] = bias[s.y_row + first + j];
    if (j >= count || (in_.drop_mask && in_.drop_mask[s.y_row + first + j])) add[j] = kNaN;
  }
  if (in_.metric == PairMetric::kL2) {
    finish_l2(value_.data(), rows_, width, x_square_.data(), term, add);
  } else {
    finish_scaled(value_.data(), rows_, width, term, add);
  }
  if (in_.x_group.data) {
    int64_t group[kMaxDotColumns] = {};
    for (int64_t j = 0; j < count; ++j) group[j] = in_.y_group[s.y_row + first + j];
    mask_groups(value_.data(), rows_, width, x_group_.data(), group, in_.same_group);
  }
  return value_.data();
}

const int32_t* PairPanels::find_meets(const PairSequence& s, int64_t first, int64_t count) {
  const int64_t width = dot_columns();
  int32_t column[kMaxDotColumns] = {};
  for (int64_t j = 0; j < count; ++j) column[j] = in_.drop_mask && in_.drop_mask[s.y_row + first + j] ? 0 : -1;
  for (int64_t i = 0; i < rows_; ++i) std::copy_n(column, width, meets_.data() + i * width);
  if (in_.x_group.data) {
    int64_t group[kMaxDotColumns] = {};
    for (int64_t j = 0; j < count; ++j) group[j] = in_.y_group[s.y_row + first + j];
    keep_groups(meets_.data(), rows_, width, x_group_.data(), group, in_.same_group);
  }
  for (int64_t i = std::max<int64_t>(first - begin_, 0); in_.exclude_self && i < rows_; ++i) {
    if (begin_ + i >= first + count) break;
    meets_[i * width + begin_ + i - first] = 0;
  }
  return meets_.data();
}

}  // namespace tokred
