// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One thread per problem. A round passes over the kernel once: eight rows at a time are multiplied with v, which gives
// their u, and while they are in L1 added to the column sums. The kernel lives in the plan. Columns come in blocks of
// 16; the last block ends with the row and overlaps the one before, and what it holds twice has v = 0 the second time:
// no row has a remainder, and none is read past its end.
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/vec16.h"
#include "common/vector_math.h"
#include "merge/sinkhorn.h"

namespace tokred {
namespace {

constexpr int64_t kRows = 8;  // that share a load of v, and one of the column sums
constexpr float kInf = std::numeric_limits<float>::infinity();

// Of one problem. Rows are padded to a multiple of kRows without mass, columns to whole blocks.
struct Problem {
  int64_t num_rows, num_cols, num_blocks, stride;  // stride of kernel
  float* kernel;
  float *f, *u, *row_mass;          // [padded rows]
  float* g;                         // [num_cols]
  float *v, *sum, *col_mass, *own;  // [num_blocks * 16]; own: 1, and 0 for columns that an earlier block holds

  TOKRED_INLINE int64_t first_column(int64_t block) const {
    const int64_t last = num_cols > kVecLanes ? num_cols - kVecLanes : 0;
    return std::min(block * kVecLanes, last);
  }
};

TOKRED_INLINE void rows_of_group(const Problem& p, int64_t begin, const float** row) {
  for (int64_t r = 0; r < kRows; ++r) row[r] = p.kernel + std::min(begin + r, p.num_rows - 1) * p.stride;
}

// sum += u x kernel, over eight rows.
TOKRED_INLINE void add_rows(const Problem& p, const float* const* row, const float* u) {
  for (int64_t b = 0; b < p.num_blocks; ++b) {
    const int64_t column = p.first_column(b);
    Vec16 sum;
    load16(p.sum + b * kVecLanes, sum);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      Vec16 k;
      load16(row[r] + column, k);
      sum += k * u[r];
    }
    store16(p.sum + b * kVecLanes, sum);
  }
}

TOKRED_INLINE void scale_columns(const Problem& p) {
  for (int64_t c = 0; c < p.num_blocks * kVecLanes; ++c) p.v[c] = p.sum[c] == 0.f ? 0.f : p.col_mass[c] / p.sum[c];
}

// v for u = 1: the second half of a round whose first half is in the kernel.
TOKRED_CLONES void scale_columns_alone(const Problem& p) {
  std::fill_n(p.sum, p.num_blocks * kVecLanes, 0.f);
  for (int64_t i = 0; i < p.num_rows; i += kRows) {
    const float* row[kRows];
    rows_of_group(p, i, row);
    add_rows(p, row, p.u + i);
  }
  scale_columns(p);
}

// A round; returns how far the row sums were off before it.
TOKRED_CLONES float make_round(const Problem& p) {
  std::fill_n(p.sum, p.num_blocks * kVecLanes, 0.f);
  float error = 0.f;
  for (int64_t i = 0; i < p.num_rows; i += kRows) {
    const float* row[kRows];
    rows_of_group(p, i, row);
    Vec16 part[kRows] = {};
    for (int64_t b = 0; b < p.num_blocks; ++b) {
      const int64_t column = p.first_column(b);
      Vec16 v;
      load16(p.v + b * kVecLanes, v);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        Vec16 k;
        load16(row[r] + column, k);
        part[r] += k * v;
      }
    }
    float sum[kRows];
    sum_lanes8(part, sum);
    float* u = p.u + i;
    const float* mass = p.row_mass + i;
    for (int64_t r = 0; r < kRows; ++r) {
      error += std::fabs(u[r] * sum[r] - mass[r]);
      u[r] = sum[r] == 0.f ? 0.f : mass[r] / sum[r];
    }
    add_rows(p, row, u);
  }
  scale_columns(p);
  return error;
}

// Whether a scaling is far from 1; 0 (no mass) and NaN are not.
TOKRED_CLONES bool any_far(const float* scaling, int64_t count) {
  int far = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float x = scaling[i];
    far |= (x > kSinkhornFar) | ((x < 1 / kSinkhornFar) & (x > 0.f));
  }
  return far != 0;
}

template <typename T>
TOKRED_CLONES float row_min(const T* cost, int64_t n) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = -kInf;
  for (int64_t c = 0; c < n; c += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, n - c);
    for (int64_t i = 0; i < here; ++i) {
      const float x = -static_cast<float>(cost[c + i]);
      lanes[i] = x > lanes[i] ? x : lanes[i];
    }
  }
  return -max_lanes(lanes);
}
template <typename T>
TOKRED_CLONES float row_exp_sum(const T* cost, int64_t n, float least, float scale) {
  float lanes[kLanes] = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, n - c);
    for (int64_t i = 0; i < here; ++i) lanes[i] += poly_exp2((least - static_cast<float>(cost[c + i])) * scale);
  }
  return sum_lanes(lanes);
}
template <typename T>
TOKRED_CLONES void take_reduced_cost(const T* cost, int64_t n, float f, float* __restrict__ g) {
  for (int64_t c = 0; c < n; ++c) {
    const float x = static_cast<float>(cost[c]) - f;
    g[c] = x < g[c] ? x : g[c];
  }
}
template <typename T>
TOKRED_CLONES void make_kernel_row(const T* cost, int64_t n, float f, const float* __restrict__ g, float scale,
                                   float* __restrict__ kernel) {
  for (int64_t c = 0; c < n; ++c) kernel[c] = poly_exp2((f + g[c] - static_cast<float>(cost[c])) * scale);
}
TOKRED_CLONES void scale_row(const float* kernel, int64_t n, float u, const float* v, float* plan) {
  for (int64_t c = 0; c < n; ++c) plan[c] = u * kernel[c] * v[c];
}

template <typename T>
void make_kernel(const SinkhornArgs& a, const T* cost, const Problem& p) {
  for (int64_t i = 0; i < p.num_rows; ++i) {
    make_kernel_row(cost + i * a.stride_row, p.num_cols, p.f[i], p.g, a.exp2_scale(), p.kernel + i * p.stride);
    p.u[i] = 1.f;
  }
  std::copy_n(p.own, p.num_blocks * kVecLanes, p.v);
}

// The first round, all in logarithms: f makes the row sums right. g takes each column's largest entry to 1, which v,
// made from sums without underflow, takes back.
template <typename T>
void first_round(const SinkhornArgs& a, const T* cost, const Problem& p) {
  std::fill_n(p.g, p.num_cols, kInf);
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const T* row = cost + i * a.stride_row;
    const float least = row_min(row, p.num_cols);
    p.f[i] = -kInf;  // of a row without mass, too, by its logarithm: no entry
    if (least == kInf) continue;
    p.f[i] = least + a.eps * std::log(p.row_mass[i] / row_exp_sum(row, p.num_cols, least, a.exp2_scale()));
    take_reduced_cost(row, p.num_cols, p.f[i], p.g);
  }
  for (int64_t c = 0; c < p.num_cols; ++c) p.g[c] = p.g[c] == kInf ? 0.f : p.g[c];
  make_kernel(a, cost, p);
  scale_columns_alone(p);
}

// The place of a column among the blocks: the first one that holds it.
int64_t place(const Problem& p, int64_t column) {
  const int64_t block = column / kVecLanes;
  return block * kVecLanes + column - p.first_column(block);
}

template <typename T>
void absorb(const SinkhornArgs& a, const T* cost, const Problem& p) {
  for (int64_t i = 0; i < p.num_rows; ++i) p.f[i] += a.eps * std::log(p.u[i]);
  for (int64_t c = 0; c < p.num_cols; ++c) p.g[c] += a.eps * std::log(p.v[place(p, c)]);
  make_kernel(a, cost, p);
}

template <typename T>
void solve(const SinkhornArgs& a, int64_t batch_idx, Problem p, float* small) {
  p.num_rows = a.rows_of(batch_idx);
  p.num_cols = a.cols_of(batch_idx);
  const int64_t m = p.num_rows, n = p.num_cols;
  float* const plan = a.plan + batch_idx * a.num_rows * a.num_cols;
  if (m == 0 || n == 0) {
    a.num_rounds[batch_idx] = 0;
    std::fill_n(plan, a.num_rows * a.num_cols, 0.f);  // which may have no memory
    return;
  }
  p.num_blocks = ceil_div<int64_t>(n, kVecLanes);
  p.kernel = n < kVecLanes ? small : plan;
  p.stride = n < kVecLanes ? kVecLanes : a.num_cols;
  if (n < kVecLanes) std::fill_n(small, m * kVecLanes, 0.f);
  std::fill_n(p.row_mass, ceil_div(m, kRows) * kRows, 0.f);
  std::fill_n(p.u, ceil_div(m, kRows) * kRows, 0.f);
  std::fill_n(p.own, p.num_blocks * kVecLanes, 0.f);
  std::fill_n(p.col_mass, p.num_blocks * kVecLanes, 0.f);
  for (int64_t i = 0; i < m; ++i) {
    p.row_mass[i] = a.row_mass ? a.row_mass[batch_idx * a.num_rows + i] : 1.f / static_cast<float>(m);
  }
  for (int64_t c = 0; c < n; ++c) {
    p.own[place(p, c)] = 1.f;
    p.col_mass[place(p, c)] = a.col_mass ? a.col_mass[batch_idx * a.num_cols + c] : 1.f / static_cast<float>(n);
  }

  const T* cost = static_cast<const T*>(a.cost) + batch_idx * a.stride_batch;
  first_round(a, cost, p);
  int32_t round = 1;
  for (bool done = false; !done && round < a.max_rounds; ++round) {
    if (any_far(p.u, m) || any_far(p.v, p.num_blocks * kVecLanes)) absorb(a, cost, p);
    done = make_round(p) < a.tol;
  }
  a.num_rounds[batch_idx] = round;

  for (int64_t c = 0; c < n; ++c) p.g[c] = p.v[place(p, c)];
  for (int64_t i = 0; i < m; ++i) {
    float* const row = plan + i * a.num_cols;
    scale_row(p.kernel + i * p.stride, n, p.u[i], p.g, row);
    std::fill(row + n, row + a.num_cols, 0.f);
  }
  std::fill_n(plan + m * a.num_cols, (a.num_rows - m) * a.num_cols, 0.f);
}

}  // namespace

void sinkhorn_cpu(const SinkhornArgs& a) {
  const int64_t rows = ceil_div(a.num_rows, kRows) * kRows, cols = ceil_div<int64_t>(a.num_cols, kVecLanes) * kVecLanes;
  const bool any_small = a.num_cols < kVecLanes || a.col_lens;
  parallel_for(a.batch_size, 1 + 4096 / (1 + a.num_rows * a.num_cols), [&](int64_t begin, int64_t end) {
    const AlignedBuffer<float> buffer(3 * rows + 5 * cols + (any_small ? rows * kVecLanes : 0));
    float* next = buffer.data();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    Problem p{};
    p.v = take(cols);
    p.sum = take(cols);
    p.col_mass = take(cols);
    p.own = take(cols);
    p.g = take(cols);
    p.f = take(rows);
    p.u = take(rows);
    p.row_mass = take(rows);
    dispatch_float(a.dtype, [&](auto tag) {
      for (int64_t b = begin; b < end; ++b) solve<typename decltype(tag)::type>(a, b, p, next);
    });
  });
}

}  // namespace tokred
