// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A warp, or for short rows a part of one, takes a pair of rows: 16 bytes per lane and load, two loads of each row
// under way. All four sums are always made: the arithmetic has time beside the reads, and there is one kernel. Which
// value is added where follows from its column alone, so rows that allow no wide load have the same bits.
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "score/row_similarity.h"

namespace tokred {
namespace {

constexpr int kAhead = 2;  // loads of each row that are made before the first is used

// Columns [column, column + kVec) of a row; zeros beyond dim, which add nothing to any sum.
template <bool kWide, int kVec, typename T>
__device__ Pack<T, kVec> load_columns(const T* row, int64_t column, int64_t dim) {
  Pack<T, kVec> pack;
  if constexpr (kWide) {
    if (column < dim) return load_pack<kVec>(row + column);
#pragma unroll
    for (int i = 0; i < kVec; ++i) pack.v[i] = T(0.f);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) pack.v[i] = column + i < dim ? row[column + i] : T(0.f);
  }
  return pack;
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kRowSimilarityThreads)
    row_similarity_kernel(const RowSimilarityArgs a, int64_t num_rows, int lanes_log2) {
  constexpr int kVec = 16 / sizeof(T);
  const int lanes = 1 << lanes_log2, thread = static_cast<int>(threadIdx.x), lane = thread & (lanes - 1);
  const int64_t row = int64_t{blockIdx.x} * (kRowSimilarityThreads >> lanes_log2) + (thread >> lanes_log2);
  // No thread leaves: all lanes of the warp take part in the shuffles.
  const int64_t dim = row < num_rows ? a.dim : 0;
  const int64_t at = row < num_rows ? row : 0;
  const T* x = static_cast<const T*>(a.x.data) + a.offset(a.x, at);
  const T* y = static_cast<const T*>(a.y.data) + a.offset(a.y, at);
  RowSums sums{0.f, 0.f, 0.f, 0.f};
  const int step = lanes * kVec;
  for (int64_t column = lane * kVec; column < dim; column += kAhead * step) {
    Pack<T, kVec> u[kAhead], v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      u[j] = load_columns<kWide, kVec>(x, column + j * step, dim);
      v[j] = load_columns<kWide, kVec>(y, column + j * step, dim);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float p = static_cast<float>(u[j].v[i]), q = static_cast<float>(v[j].v[i]), d = p - q;
        sums.xy += p * q;
        sums.xx += p * p;
        sums.yy += q * q;
        sums.dd += d * d;
      }
    }
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {  // stays within the lanes of a row
    sums.xy += __shfl_xor_sync(kFullMask, sums.xy, offset);
    sums.xx += __shfl_xor_sync(kFullMask, sums.xx, offset);
    sums.yy += __shfl_xor_sync(kFullMask, sums.yy, offset);
    sums.dd += __shfl_xor_sync(kFullMask, sums.dd, offset);
  }
  if (lane == 0 && row < num_rows) write_similarity(a, row, sums);
}

bool is_wide(const RowsAt& rows, int64_t dim, int64_t bytes) {
  uint64_t all = reinterpret_cast<uint64_t>(rows.data) | static_cast<uint64_t>(dim * bytes);
  for (const int64_t stride : rows.stride) all |= static_cast<uint64_t>(stride * bytes);
  return all % 16 == 0;
}

}  // namespace

int row_similarity_cuda(const RowSimilarityArgs& a, CUstream_st* stream) {
  int error = cudaErrorInvalidValue;
  dispatch_float(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int lanes_log2 = row_similarity_lanes_log2(a.dim, sizeof(T));
    const int64_t blocks = ceil_div<int64_t>(a.num_rows(), kRowSimilarityThreads >> lanes_log2);
    if (blocks > INT32_MAX) {
      error = cudaErrorInvalidConfiguration;
      return;
    }
    const auto run = [&](auto kernel) {
      return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kRowSimilarityThreads), 0, stream, a,
                    a.num_rows(), lanes_log2);
    };
    const bool wide = is_wide(a.x, a.dim, sizeof(T)) && is_wide(a.y, a.dim, sizeof(T));
    error = wide ? run(row_similarity_kernel<T, true>) : run(row_similarity_kernel<T, false>);
  });
  return error;
}

}  // namespace tokred
