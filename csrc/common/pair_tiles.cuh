// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Similarities of 64 rows with all of a share of others, 128 at a time: they appear in tensor-core accumulators, are
// folded there and are gone. Rows enter the product as they are; what a similarity needs beside it (norms) is summed
// from the same tiles while they pass by, so nothing is read twice.
#pragma once

#include "common/pair.h"
#include "common/row_tiles.cuh"

namespace tokred {

// Of the pipeline. Three take 72 KiB: three blocks (two of float32, by registers) fill an SM of 227 KiB. Two leave room
// for more beside them in the 99 KiB that every GPU gives a block.
constexpr int kPairStages = 3;

static_assert(kPairThreads == kTileThreads, "four warps");

template <int kStages = kPairStages>
struct PairTiles {
  StepTile<kPairBlockX> x[kStages];
  StepTile<kPairBlockY> y[kStages];
  float x_term[kPairBlockX];  // of each row, from its sum of squares
  float y_term[kPairBlockY];  // NaN: nobody meets this row
};

template <typename T>
struct PairRows {
  const T* first;
  int64_t stride, count;
};

using PairAcc = float[2][8][4];

// Which of a tile's similarities a thread holds: four warps, two by rows and two by columns, 32 x 64 each, and in them
// four rows of sixteen columns per thread. Columns ascend with i.
struct PairCorner {
  int first_row = warp_index() % 2 * 32, first_col = warp_index() / 2 * 64;
  __device__ int row(int r) const { return first_row + 16 * (r / 2) + 8 * (r % 2) + lane_index() / 4; }
  __device__ int column(int i) const { return first_col + 8 * (i / 2) + 2 * (lane_index() % 4) + i % 2; }
};
__device__ inline float& pair_product(PairAcc& acc, int r, int i) { return acc[r / 2][i / 2][2 * (r % 2) + i % 2]; }

namespace detail {
// Adds the squares of what this thread itself has loaded; no barrier is needed for that.
template <typename T, int kRows>
__device__ inline void thread_add_squares(StepTile<kRows>& tile, float (&sum)[kRows / kRowsPerPass]) {
  constexpr int kPerChunk = 16 / sizeof(T);
  const int column = static_cast<int>(threadIdx.x) % kChunks;
#pragma unroll
  for (int i = 0; i < kRows / kRowsPerPass; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kChunks + i * kRowsPerPass;
    const auto pack = load_pack<kPerChunk>(reinterpret_cast<const T*>(tile.chunk(row, column)));
#pragma unroll
    for (int c = 0; c < kPerChunk; ++c) sum[i] += static_cast<float>(pack.v[c]) * static_cast<float>(pack.v[c]);
  }
}

// terms[row] = term(row, sum of squares), and clears the sums.
template <int kRows, typename Term>
__device__ inline void block_write_terms(float (&sum)[kRows / kRowsPerPass], float* terms, const Term& term) {
#pragma unroll
  for (int i = 0; i < kRows / kRowsPerPass; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kChunks + i * kRowsPerPass;
    const float square = warp_sum<kChunks>(sum[i]);
    sum[i] = 0.f;
    if (threadIdx.x % kChunks == 0) terms[row] = term(row, square);
  }
}
}  // namespace detail

// Meets x (its first 64 rows) with tiles [tile_begin, tile_end) of y. x_term(row, square) and y_term(row of y, square)
// give the terms; squares are zero unless need_squares. fold(acc, first row of y) sees each tile's products, in order,
// when the terms are visible; x_term and y_term may write shared memory for it, too. Called by the whole block.
template <typename T, bool kVectorLoads, int kStages, typename XTerm, typename YTerm, typename Fold>
__device__ inline void block_meet(PairTiles<kStages>& shared, const PairRows<T>& x, const PairRows<T>& y, int64_t dim,
                                  int tile_begin, int tile_end, bool need_squares, const XTerm& x_term,
                                  const YTerm& y_term, Fold&& fold) {
  const int num_steps = static_cast<int>(max(ceil_div<int64_t>(dim * sizeof(T), kStepBytes), int64_t{1}));
  const int total = (tile_end - tile_begin) * num_steps;
  int load_tile = tile_begin, load_step = 0;
  const auto load = [&](int it) {  // called for it = 0, 1, ...
    if (it < total) {
      const int stage = it % kStages;
      const int64_t column = int64_t{load_step} * (kStepBytes / sizeof(T)), first_y = int64_t{load_tile} * kPairBlockY;
      thread_load<T, kVectorLoads>(shared.x[stage], x.first, x.stride, x.count, column, dim);
      thread_load<T, kVectorLoads>(shared.y[stage], y.first + first_y * y.stride, y.stride, y.count - first_y, column,
                                   dim);
      if (++load_step == num_steps) {
        load_step = 0;
        ++load_tile;
      }
    }
    cp_async_commit();
  };

  const PairCorner corner;
  PairAcc acc = {};
  float x_squares[kPairBlockX / kRowsPerPass] = {}, y_squares[kPairBlockY / kRowsPerPass] = {};
  for (int it = 0; it < kStages - 1; ++it) load(it);
  int tile = tile_begin, step = 0;
  for (int it = 0; it < total; ++it) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // step it is there for all, and step it - 1 is read by all
    load(it + kStages - 1);
    const int stage = it % kStages;
    const int64_t first_y = int64_t{tile} * kPairBlockY;
    if (need_squares) {
      if (tile == tile_begin) detail::thread_add_squares<T>(shared.x[stage], x_squares);
      detail::thread_add_squares<T>(shared.y[stage], y_squares);
    }
    warp_product<T>(shared.x[stage], shared.y[stage], corner.first_row, corner.first_col,
                    static_cast<int>(min(y.count - first_y, int64_t{kPairBlockY})), acc);
    if (++step < num_steps) continue;
    // The terms' readers of the tile before have passed this step's barrier.
    if (tile == tile_begin) detail::block_write_terms<kPairBlockX>(x_squares, shared.x_term, x_term);
    detail::block_write_terms<kPairBlockY>(y_squares, shared.y_term,
                                           [&](int row, float square) { return y_term(first_y + row, square); });
    __syncthreads();  // the terms are written
    fold(acc, static_cast<int>(first_y));
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i / 32][i / 4 % 8][i % 4] = 0.f;
    step = 0;
    ++tile;
  }
}

// The best similarity that this thread has seen for each of its four rows, and its row of y; -1: nothing but NaN so
// far.
struct PairBest {
  float value[4];
  int column[4];
  __device__ PairBest() {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      value[r] = -__uint_as_float(0x7f800000u);
      column[r] = -1;
    }
  }
};

// Folds a tile: value_of(row, column, product), both in the tile, gives each similarity. Columns ascend, only a larger
// value replaces, and a comparison with NaN is false. acc holds the similarities afterwards.
template <typename Value>
__device__ inline void thread_fold_best(PairAcc& acc, int first_y, const Value& value_of, PairBest& best) {
  const PairCorner corner;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& value = pair_product(acc, r, i);
      value = value_of(corner.row(r), corner.column(i), value);
      if (value > best.value[r]) {
        best.value[r] = value;
        best.column[r] = first_y + corner.column(i);
      }
    }
    if (best.column[r] < 0) {  // -inf is a number, too
#pragma unroll
      for (int i = 15; i >= 0; --i) {
        if (pair_product(acc, r, i) == best.value[r]) best.column[r] = first_y + corner.column(i);
      }
    }
  }
}

// Joins what the lanes that share a row have found, each a packed value of which the largest wins: into
// shared[warp_index() / 2][row]. It is whole after the next barrier, for the two warps that share a row.
__device__ inline void warp_join_best(const unsigned long long (&packed)[4],
                                      unsigned long long (*shared)[kPairBlockX]) {
  const PairCorner corner;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const unsigned long long best = warp_reduce<4>(packed[r], Max());
    if (lane_index() % 4 == 0) shared[warp_index() / 2][corner.row(r)] = best;
  }
}

}  // namespace tokred
