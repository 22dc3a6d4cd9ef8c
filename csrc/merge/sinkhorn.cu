// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: the cost read and the plan written once; what lies between stays on the SM. One block per problem runs all
// rounds, so convergence needs no host and nobody waits for another problem. A round is one pass over the kernel: a
// warp takes four rows, multiplies them with v and, while they are in registers, adds u times them to its column sums
// (above 128 columns, in a second pass). Every sum has one fixed order, which depends on the problem's own size alone.
#include "common/block.cuh"
#include "common/launch.cuh"
#include "merge/sinkhorn.h"

namespace tokred {
namespace {

constexpr int kWarps = kSinkhornThreads / kWarpSize;
constexpr int kPerLane = 4;                     // columns of a lane
constexpr int kColumns = kPerLane * kWarpSize;  // of a pass
constexpr int kRows = 4;                        // of a warp at a time: their loads and sums are in flight together

struct SinkhornStorage {
  BlockScratch scratch;
  float partial[kWarps][kColumns];
};  // tail: the first rows of the kernel

// One problem, by its block.
struct Problem {
  const SinkhornArgs& a;
  SinkhornStorage& s;
  int num_rows, num_cols, shared_rows;
  float *shared, *plan;
  float *f, *u, *g, *v;
  const float *given_row_mass, *given_col_mass;

  __device__ float* kernel_row(int row) const {
    return row < shared_rows ? shared + row * num_cols : plan + row * a.num_cols;
  }
  __device__ float row_mass(int row) const {
    return given_row_mass ? given_row_mass[row] : 1.f / static_cast<float>(num_rows);
  }
  __device__ float col_mass(int column) const {
    return given_col_mass ? given_col_mass[column] : 1.f / static_cast<float>(num_cols);
  }
  // Where there is nothing to scale, nothing is scaled.
  __device__ static float ratio(float mass, float sum) { return sum == 0.f ? 0.f : mass / sum; }

  // body(first row of a group of kRows): the warp's groups.
  template <typename Body>
  __device__ void for_groups(const Body& body) const {
    for (int row = warp_index() * kRows; row < num_rows; row += kWarps * kRows) body(row);
  }

  // value[r][c]: column base + lane + 32 c of row first + r; 0 outside.
  __device__ void load_group(int first, int base, float (&value)[kRows][kPerLane]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float* const row = kernel_row(min(first + r, num_rows - 1)) + base;
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) {
        const int column = lane_index() + c * kWarpSize;
        value[r][c] = first + r < num_rows && base + column < num_cols ? row[column] : 0.f;
      }
    }
  }

  // Folds the warps' values of columns base + lane + 32 c; take(column, value) in one thread per column. Ends with a
  // barrier.
  template <typename Op, typename Take>
  __device__ void fold_columns(int base, const float (&value)[kPerLane], const Op& op, const Take& take) const {
#pragma unroll
    for (int c = 0; c < kPerLane; ++c) s.partial[warp_index()][lane_index() + c * kWarpSize] = value[c];
    __syncthreads();  // all warps' values are written
    const int column = thread_rank();
    if (column < kColumns && base + column < num_cols) {
      float all = s.partial[0][column];
#pragma unroll 4
      for (int w = 1; w < kWarps; ++w) all = op(all, s.partial[w][column]);
      take(base + column, all);
    }
    __syncthreads();  // they are read, and what take has written is there
  }

  __device__ void scale_columns(int base, const float (&sum)[kPerLane], bool& far) const {
    fold_columns(base, sum, Add(), [&](int column, float total) {
      v[column] = ratio(col_mass(column), total);
      far |= is_far(v[column]);
    });
  }
  __device__ static bool is_far(float x) { return x > kSinkhornFar || (x < 1 / kSinkhornFar && x > 0.f); }

  // The second half of a round alone.
  __device__ void column_step(bool& far) const {
    for (int base = 0; base < num_cols; base += kColumns) {
      float sum[kPerLane] = {};
      for_groups([&](int first) {
        float value[kRows][kPerLane];
        load_group(first, base, value);
        add_group(first, value, sum);
      });
      scale_columns(base, sum, far);
    }
  }
  __device__ void add_group(int first, const float (&value)[kRows][kPerLane], float (&sum)[kPerLane]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float scale = u[min(first + r, num_rows - 1)];
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) sum[c] += scale * value[r][c];
    }
  }

  // A round. Returns how far the row sums were off before it, and whether a scaling is far from 1: in every thread.
  __device__ float round(bool& far) const {
    float error = 0.f, sum[kPerLane] = {};
    far = false;
    for_groups([&](int first) {
      float value[kRows][kPerLane], dot[kRows] = {};
      for (int base = 0; base < num_cols; base += kColumns) {
        load_group(first, base, value);
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) {
          const int column = base + lane_index() + c * kWarpSize;
          const float scale = column < num_cols ? v[column] : 0.f;
#pragma unroll
          for (int r = 0; r < kRows; ++r) dot[r] += value[r][c] * scale;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) dot[r] = warp_sum(dot[r]);
      float mine = dot[0];
#pragma unroll
      for (int r = 1; r < kRows; ++r) mine = lane_index() == r ? dot[r] : mine;
      const int row = first + lane_index();
      if (lane_index() < kRows && row < num_rows) {
        const float mass = row_mass(row);
        error += fabsf(u[row] * mine - mass);
        u[row] = ratio(mass, mine);
        far |= is_far(u[row]);
      }
      __syncwarp();  // u of the group is written
      if (num_cols <= kColumns) add_group(first, value, sum);
    });
    if (num_cols <= kColumns) {
      scale_columns(0, sum, far);
    } else {
      column_step(far);  // each warp reads the u that it wrote
    }
    far = __syncthreads_or(far) != 0;
    return block_sum(error, s.scratch);
  }

  // kernel = exp((f + g - cost) / eps), and scalings of 1. f and g are written; ends with a barrier.
  template <typename T>
  __device__ void make_kernel(const T* cost) const {
    const float scale = a.exp2_scale();
    for (int row = warp_index(); row < num_rows; row += kWarps) {
      const T* const from = cost + row * a.stride_row;
      float* const to = kernel_row(row);
      const float shift = f[row];
#pragma unroll 4
      for (int c = lane_index(); c < num_cols; c += kWarpSize) {
        to[c] = exp2f((shift + g[c] - static_cast<float>(from[c])) * scale);
      }
    }
    for (int i = thread_rank(); i < num_rows; i += kSinkhornThreads) u[i] = 1.f;
    for (int c = thread_rank(); c < num_cols; c += kSinkhornThreads) v[c] = 1.f;
    __syncthreads();  // the kernel and its scalings are written
  }

  // All in logarithms: f makes the row sums right. g takes each column's largest entry to 1, which v, made from sums
  // without underflow, takes back.
  template <typename T>
  __device__ void first_round(const T* cost, bool& far) const {
    const float scale = a.exp2_scale();
    for (int row = warp_index(); row < num_rows; row += kWarps) {
      const T* const from = cost + row * a.stride_row;
      float least = INFINITY, sum = 0.f;
      for (int c = lane_index(); c < num_cols; c += kWarpSize) least = min(least, static_cast<float>(from[c]));
      least = warp_min(least);
      for (int c = lane_index(); c < num_cols; c += kWarpSize) {
        sum += exp2f((least - static_cast<float>(from[c])) * scale);
      }
      sum = warp_sum(sum);
      // Of a row without mass -inf, too, by its logarithm: no entry.
      if (lane_index() == 0) f[row] = least == INFINITY ? -INFINITY : least + a.eps * logf(row_mass(row) / sum);
      __syncwarp();  // f of this warp's rows is there for its lanes
    }
    for (int base = 0; base < num_cols; base += kColumns) {
      float least[kPerLane];
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) least[c] = INFINITY;
      for (int row = warp_index(); row < num_rows; row += kWarps) {
        const float shift = f[row];
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) {
          const int column = base + lane_index() + c * kWarpSize;
          if (column < num_cols) {
            least[c] = min(least[c], static_cast<float>(cost[row * a.stride_row + column]) - shift);
          }
        }
      }
      fold_columns(base, least, Min(), [&](int column, float all) { g[column] = all == INFINITY ? 0.f : all; });
    }
    make_kernel(cost);
    far = false;
    column_step(far);
    far = __syncthreads_or(far) != 0;
  }

  template <typename T>
  __device__ void absorb(const T* cost) const {
    for (int i = thread_rank(); i < num_rows; i += kSinkhornThreads) f[i] += a.eps * logf(u[i]);
    for (int c = thread_rank(); c < num_cols; c += kSinkhornThreads) g[c] += a.eps * logf(v[c]);
    __syncthreads();  // f and g are written, and u and v read
    make_kernel(cost);
  }
};

template <typename T>
__global__ void __launch_bounds__(kSinkhornThreads) sinkhorn_kernel(const SinkhornArgs a, int shared_floats) {
  TOKRED_SHARED(SinkhornStorage, s);
  const int64_t batch_idx = blockIdx.x;
  const int num_rows = static_cast<int>(a.rows_of(batch_idx)), num_cols = static_cast<int>(a.cols_of(batch_idx));
  const int64_t plan_size = a.num_rows * a.num_cols;
  float* const plan = a.plan + batch_idx * plan_size;
  if (num_rows == 0 || num_cols == 0) {
    for (int64_t i = thread_rank(); i < plan_size; i += kSinkhornThreads) plan[i] = 0.f;
    if (thread_rank() == 0) a.num_rounds[batch_idx] = 0;
    return;  // the whole block
  }
  float* const work = a.workspace + batch_idx * 2 * (a.num_rows + a.num_cols);
  const Problem p{
      a,
      s,
      num_rows,
      num_cols,
      min(num_rows, shared_floats / num_cols),
      reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(&s) + shared_tail_offset<SinkhornStorage>()),
      plan,
      work,
      work + a.num_rows,
      work + 2 * a.num_rows,
      work + 2 * a.num_rows + a.num_cols,
      a.row_mass ? a.row_mass + batch_idx * a.num_rows : nullptr,
      a.col_mass ? a.col_mass + batch_idx * a.num_cols : nullptr};
  const T* const cost = static_cast<const T*>(a.cost) + batch_idx * a.stride_batch;
  bool far;
  p.first_round(cost, far);
  int round = 1;
  for (bool done = false; !done && round < a.max_rounds; ++round) {  // the same in all threads
    if (far) p.absorb(cost);
    done = p.round(far) < a.tol;
  }
  if (thread_rank() == 0) a.num_rounds[batch_idx] = round;
  for (int row = warp_index(); row < a.num_rows; row += kWarps) {
    float* const to = plan + row * a.num_cols;
    const bool live = row < num_rows;
    const float* const from = live ? p.kernel_row(row) : to;
    const float scale = live ? p.u[row] : 0.f;
    for (int c = lane_index(); c < a.num_cols; c += kWarpSize) {
      to[c] = live && c < num_cols ? scale * from[c] * p.v[c] : 0.f;
    }
  }
}

}  // namespace

int sinkhorn_cuda(const SinkhornArgs& a, CUstream_st* stream) {
  if (a.batch_size == 0) return cudaSuccess;
  const int64_t shared = sinkhorn_shared_bytes(a);
  int error = cudaErrorInvalidValue;
  dispatch_float(a.dtype, [&](auto tag) {
    error = launch(sinkhorn_kernel<typename decltype(tag)::type>, dim3(static_cast<unsigned>(a.batch_size)),
                   dim3(kSinkhornThreads), shared_bytes_with_tail<SinkhornStorage>(static_cast<size_t>(shared)), stream,
                   a, static_cast<int>(shared / 4));
  });
  return error;
}

}  // namespace tokred
