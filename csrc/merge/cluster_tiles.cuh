// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Pairs of tokens on tensor cores: a block takes kClusterBlockRows rows and walks over columns, kClusterBlockCols at a
// time; each tile of products is handed on in registers and is gone. A product's bits depend on its two rows alone, so
// the product of a row with itself is the squared norm by which its distance to an equal row is exactly 0.
#pragma once

#include "common/row_tiles.cuh"
#include "merge/cluster_tiles.h"

namespace tokred {

constexpr int kClusterStages = 3;  // 72 KiB of shared memory

// Rows 0, 1, ... of x or, if listed, list[0], list[1], ...
template <typename T, bool kListed>
struct ClusterTileRows {
  const T* x;
  int64_t stride;  // between rows, in elements
  const int32_t* list;
  int count;

  template <bool kVectorLoads, int kRows>
  __device__ void load(StepTile<kRows>& tile, int begin, int64_t first_column, int64_t dim) const {
    if constexpr (kListed) {
      const auto place_of = [&](int i) { return begin + i < count ? int64_t{list[begin + i]} : int64_t{-1}; };
      thread_load_listed<T, kVectorLoads>(tile, x, stride, place_of, first_column, dim);
    } else {
      thread_load<T, kVectorLoads>(tile, x + begin * stride, stride, count - begin, first_column, dim);
    }
  }
  __device__ int row(int i) const { return kListed ? list[i] : i; }
};

struct ClusterTileStorage {
  StepTile<kClusterBlockRows> rows[kClusterStages];
  StepTile<kClusterBlockCols> cols[kClusterStages];
  float row_term[kClusterBlockRows], col_term[kClusterBlockCols];
};

// Calls fold(r, row, col, product, row_term, col_term) for each pair of the rows [row_begin, + kClusterBlockRows) and
// the columns of tiles [tile_begin, tile_end), in every thread for those it holds: four rows, r = 0 .. 3, and columns
// ascending for each. Terms come from row_term_of and
// col_term_of(row of x) and are NaN past the end, where fold is called, too. All threads
// of the block call it; it ends with its accumulators read and shared memory in use.
template <typename T, bool kVectorLoads, bool kRowList, bool kColList, typename RowTerm, typename ColTerm,
          typename Fold>
__device__ inline void block_for_cluster_pairs(ClusterTileStorage& shared, const ClusterTileRows<T, kRowList>& rows,
                                               int row_begin, const ClusterTileRows<T, kColList>& cols, int tile_begin,
                                               int tile_end, int64_t dim, const RowTerm& row_term_of,
                                               const ColTerm& col_term_of, Fold&& fold) {
  static_assert(kTileThreads == kClusterBlockCols, "one column's term each");
  const float kNone = __uint_as_float(0x7fc00000u);
  const int num_steps = static_cast<int>(max(ceil_div<int64_t>(dim * sizeof(T), kStepBytes), int64_t{1}));
  const int total = (tile_end - tile_begin) * num_steps, thread = static_cast<int>(threadIdx.x);
  int load_tile = tile_begin, load_step = 0;
  const auto load = [&](int it) {  // called for it = 0, 1, ...
    if (it < total) {
      const int64_t column = int64_t{load_step} * (kStepBytes / sizeof(T));
      rows.template load<kVectorLoads>(shared.rows[it % kClusterStages], row_begin, column, dim);
      cols.template load<kVectorLoads>(shared.cols[it % kClusterStages], load_tile * kClusterBlockCols, column, dim);
      if (++load_step == num_steps) {
        load_step = 0;
        ++load_tile;
      }
    }
    cp_async_commit();
  };
  const auto col_term_at = [&](int i) { return i < cols.count ? col_term_of(cols.row(i)) : kNone; };

  if (thread < kClusterBlockRows) {
    const int row = row_begin + thread;
    shared.row_term[thread] = row < rows.count ? row_term_of(rows.row(row)) : kNone;
  }
  const int first_row = warp_index() % 2 * 32, first_col = warp_index() / 2 * 64, lane = lane_index();
  float acc[2][8][4] = {}, next_term = kNone;
  for (int it = 0; it < kClusterStages - 1; ++it) load(it);
  int tile = tile_begin, step = 0;
  for (int it = 0; it < total; ++it) {
    cp_async_wait<kClusterStages - 2>();
    __syncthreads();  // step it is there for all, and step it - 1 and the terms of the tile before are read by all
    load(it + kClusterStages - 1);
    const int col_begin = tile * kClusterBlockCols;
    if (step == 0) next_term = col_term_at(col_begin + thread);
    warp_product<T>(shared.rows[it % kClusterStages], shared.cols[it % kClusterStages], first_row, first_col,
                    cols.count - col_begin, acc);
    if (++step < num_steps) continue;
    shared.col_term[thread] = next_term;
    __syncthreads();  // terms are written
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first_row + 16 * (r / 2) + 8 * (r % 2) + lane / 4;
      const float row_term = shared.row_term[row];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int col = first_col + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
        float& value = acc[r / 2][i / 2][2 * (r % 2) + i % 2];
        fold(r, row_begin + row, col_begin + col, value, row_term, shared.col_term[col]);
        value = 0.f;
      }
    }
    step = 0;
    ++tile;
  }
}

// The row of fold's r that this thread holds.
__device__ inline int thread_cluster_row(int row_begin, int r) {
  return row_begin + warp_index() % 2 * 32 + 16 * (r / 2) + 8 * (r % 2) + lane_index() / 4;
}

// Squared distance from a product and the rows' squared norms. NaN stays.
__device__ inline float cluster_distance(float product, float row_square, float col_square) {
  const float distance = (row_square + col_square) - 2.f * product;
  return distance < 0.f ? 0.f : distance;
}

// emit(row, square) for the rows [row_begin, + kTileThreads): each one's product with itself.
template <typename T, bool kVectorLoads, typename Emit>
__device__ inline void block_cluster_squares(StepTile<kTileThreads>& shared, const ClusterTileRows<T, false>& rows,
                                             int row_begin, int64_t dim, const Emit& emit) {
  const int num_steps = static_cast<int>(max(ceil_div<int64_t>(dim * sizeof(T), kStepBytes), int64_t{1}));
  const int first = warp_index() * 32, lane = lane_index();
  float acc[2][8][4] = {};
  for (int step = 0; step < num_steps; ++step) {
    __syncthreads();  // the step before is read by all
    rows.template load<kVectorLoads>(shared, row_begin, int64_t{step} * (kStepBytes / sizeof(T)), dim);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // the step is there for all
    warp_product<T>(shared, shared, first, first, first + 32, acc);
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {  // 8 column tiles, 4 accumulators each
      const int row = 16 * m + 8 * (i % 4 / 2) + lane / 4, col = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      if (row == col && row_begin + first + row < rows.count) emit(row_begin + first + row, acc[m][i / 4][i % 4]);
    }
  }
}

}  // namespace tokred
