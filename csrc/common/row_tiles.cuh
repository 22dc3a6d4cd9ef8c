// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Products of rows with rows on tensor cores, by blocks of kTileThreads threads: both operands pass through shared
// memory kStepBytes at a time (cp.async where rows are aligned), and each warp multiplies a 32 x 64 corner. Half and
// bfloat16 are multiplied as they are, float32 as three TF32 products.
#pragma once

#include "common/cp_async.cuh"
#include "common/mma.cuh"

namespace tokred {

constexpr int kTileThreads = 128;
constexpr int kStepBytes = 128;  // of each row, per step: 32 floats or 64 halves
constexpr int kChunks = kStepBytes / 16;
constexpr int kRowsPerPass = kTileThreads / kChunks;

// Rows of kStepBytes; the 16-byte chunks of a row are permuted so that eight rows of one column lie in different banks.
template <int kRows>
struct StepTile {
  unsigned char bytes[kRows * kStepBytes];
  __device__ unsigned char* chunk(int row, int column) {
    return bytes + row * kStepBytes + (column ^ (row % kChunks)) * 16;
  }
};

// One 16-byte chunk of a tile's row; from: its first value, where the row is valid. Columns past dim become zeros.
// anywhere: a readable address.
template <typename T, bool kVectorLoads, int kRows>
__device__ inline void thread_load_chunk(StepTile<kRows>& tile, int row, bool valid_row, const T* from,
                                         const T* anywhere, int64_t begin, int64_t dim) {
  constexpr int kPerChunk = 16 / sizeof(T);
  const int column = static_cast<int>(threadIdx.x) % kChunks;
  if constexpr (kVectorLoads) {
    const bool valid = valid_row && begin < dim;
    cp_async_16(tile.chunk(row, column), valid ? from : anywhere, valid);
  } else {
    Pack<T, kPerChunk> pack;
#pragma unroll
    for (int c = 0; c < kPerChunk; ++c) pack.v[c] = valid_row && begin + c < dim ? from[c] : T(0.f);
    store_pack(reinterpret_cast<T*>(tile.chunk(row, column)), pack);
  }
}

// Thread t moves chunk t % kChunks of rows t / kChunks, + kRowsPerPass, ...; rows and columns past the end become
// zeros.
template <typename T, bool kVectorLoads, int kRows>
__device__ inline void thread_load(StepTile<kRows>& tile, const T* rows, int64_t stride_row, int64_t num_rows,
                                   int64_t first_column, int64_t dim) {
  const int64_t begin = first_column + static_cast<int>(threadIdx.x) % kChunks * (16 / sizeof(T));
  const T* from = rows + static_cast<int>(threadIdx.x) / kChunks * stride_row + begin;
  [[maybe_unused]] constexpr int kUnroll =
      kVectorLoads ? kRows / kRowsPerPass : 2;  // single values pass through registers
#pragma unroll kUnroll
  for (int i = 0; i < kRows / kRowsPerPass; ++i, from += kRowsPerPass * stride_row) {
    const int row = static_cast<int>(threadIdx.x) / kChunks + i * kRowsPerPass;
    thread_load_chunk<T, kVectorLoads>(tile, row, row < num_rows, from, rows, begin, dim);
  }
}

// The same of rows that are anywhere: place_of(row) after rows, -1: zeros.
template <typename T, bool kVectorLoads, int kRows, typename PlaceOf>
__device__ inline void thread_load_listed(StepTile<kRows>& tile, const T* rows, int64_t stride_row,
                                          const PlaceOf& place_of, int64_t first_column, int64_t dim) {
  const int64_t begin = first_column + static_cast<int>(threadIdx.x) % kChunks * (16 / sizeof(T));
#pragma unroll
  for (int i = 0; i < kRows / kRowsPerPass; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kChunks + i * kRowsPerPass;
    const int64_t place = place_of(row);
    thread_load_chunk<T, kVectorLoads>(tile, row, place >= 0, rows + max(place, int64_t{0}) * stride_row + begin, rows,
                                       begin, dim);
  }
}

// One warp's 32 x 64 corner of the product of a step; columns from num_cols on are left alone.
template <typename T, int kSrc, int kDst>
__device__ inline void warp_product(StepTile<kSrc>& src, StepTile<kDst>& dst, int first_row, int first_col,
                                    int num_cols, float (&acc)[2][8][4]) {
  const int lane = lane_index();
#pragma unroll
  for (int k = 0; k < kChunks; k += 2) {  // 32 bytes: the depth of one m16n8k16 of halves, one m16n8k8 of floats
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], src.chunk(first_row + 16 * m + lane % 16, k + lane / 16));
    [[maybe_unused]] uint32_t a_small[2][4];
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Tf32Pair pair = split_tf32(__uint_as_float(a[i / 4][i % 4]));
        a[i / 4][i % 4] = pair.big;
        a_small[i / 4][i % 4] = pair.small;
      }
    }
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      if (first_col + 8 * n >= num_cols) break;  // the same in the whole warp
      uint32_t quad[4];
      ldmatrix_x4(quad, dst.chunk(first_col + 8 * n + lane % 8 + 8 * (lane / 16), k + lane / 8 % 2));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t b[2] = {quad[2 * h], quad[2 * h + 1]};
        if constexpr (std::is_same_v<T, float>) {
          const Tf32Pair low = split_tf32(__uint_as_float(b[0])), high = split_tf32(__uint_as_float(b[1]));
          const uint32_t b_big[2] = {low.big, high.big}, b_small[2] = {low.small, high.small};
#pragma unroll
          for (int m = 0; m < 2; ++m) {  // small terms first, as in mma_m16n8k8_3xtf32
            mma_m16n8k8_tf32(acc[m][n + h], a_small[m], b_big);
            mma_m16n8k8_tf32(acc[m][n + h], a[m], b_small);
            mma_m16n8k8_tf32(acc[m][n + h], a[m], b_big);
          }
        } else {
#pragma unroll
          for (int m = 0; m < 2; ++m) mma_m16n8k16<T>(acc[m][n + h], a[m], b);
        }
      }
    }
  }
}

}  // namespace tokred
