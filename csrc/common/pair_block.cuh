// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// A CUDA block of an op over PairInputs: where it works, and from products to similarities.
#pragma once

#include "common/launch.cuh"
#include "common/pair_tiles.cuh"

namespace tokred {

// Where a block works: grid is blocks of x * shares of y, the shares of one block side by side, as they read the same
// rows of x.
struct PairPlace {
  PairSequence s;
  int64_t x_begin;  // its first row in the sequence
  int share;
};
__device__ inline PairPlace pair_place(const PairInputs& in, int num_shares) {
  const int64_t index = blockIdx.x / static_cast<unsigned>(num_shares);
  const int share = static_cast<int>(blockIdx.x % static_cast<unsigned>(num_shares));
  if (!in.cu_x) {
    const int64_t per_batch = ceil_div(in.num_x, int64_t{kPairBlockX});
    return {pair_sequence(in, index / per_batch), index % per_batch * kPairBlockX, share};
  }
  const auto before = [&](int b) { return int64_t{in.cu_x[b] / kPairBlockX + b}; };
  const int b = min(warp_search(static_cast<int>(in.batch_size), index, before), static_cast<int>(in.batch_size) - 1);
  const PairSequence s = pair_sequence(in, b);
  const int64_t block = index - before(b);
  return {s, block < 0 ? s.num_x : block * kPairBlockX, share};  // below 0: cu_x does not grow
}

// What folds know of their block, in shared memory: registers are for the products.
template <int kStages = kPairStages>
struct PairStorage {
  PairTiles<kStages> tiles;
  float y_bias[kPairBlockY];
  PairSequence s;
  int64_t x_begin;

  __device__ bool meets(const PairInputs& in, int row, int64_t j) const {
    const int64_t i = x_begin + row;
    return i < s.num_x && j < s.num_y && pair_meets(in, s, i, j);
  }
};

// A bit for each of the thread's pairs in the tile, 16 r + i, that do not meet.
template <int kStages>
__device__ inline uint64_t thread_find_apart(const PairInputs& in, const PairStorage<kStages>& block, int first_y) {
  const PairCorner corner;
  uint64_t apart = 0;
#pragma unroll 1  // its registers would be missing elsewhere
  for (int i = 0; i < 64; ++i) {
    if (!block.meets(in, corner.row(i / 16), first_y + corner.column(i % 16))) apart |= uint64_t{1} << i;
  }
  return apart;
}

// Turns a tile's products into similarities with their bias; NaN for rows of y that are dropped or past the end.
template <int kStages>
__device__ inline void thread_similarities(PairAcc& acc, PairMetric metric, const PairStorage<kStages>& block) {
  const PairCorner corner;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float x = block.tiles.x_term[corner.row(r)];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& value = pair_product(acc, r, i);
      const int column = corner.column(i);
      if (metric == PairMetric::kL2) {
        value = 2.f * value - (x + block.tiles.y_term[column]);
        value = value > 0.f ? 0.f : value;
      } else {
        value = value * x * block.tiles.y_term[column];
      }
      value += block.y_bias[column];
    }
  }
}

// block_meet for the block's place and tiles [tile_begin, tile_end); bias: a value per row of y, may be null.
template <typename T, bool kVectorLoads, int kStages, typename Fold>
__device__ inline void block_meet_place(PairStorage<kStages>& shared, const PairInputs& in, const PairPlace& place,
                                        const float* bias, int tile_begin, int tile_end, Fold&& fold) {
  const PairSequence& s = place.s;
  if (threadIdx.x == 0) {  // read after block_meet's barriers
    shared.s = s;
    shared.x_begin = place.x_begin;
  }
  const auto term = [&](float square) {
    if (in.metric == PairMetric::kL2) return square;
    const float norm = sqrtf(square);
    return in.metric == PairMetric::kDot ? 1.f : 1.f / (norm < kPairEps ? kPairEps : norm);
  };
  const T* x = static_cast<const T*>(in.x) + s.x + place.x_begin * in.stride_x;
  const T* y = static_cast<const T*>(in.y) + s.y;
  block_meet<T, kVectorLoads>(
      shared.tiles, PairRows<T>{x, in.stride_x, s.num_x - place.x_begin}, PairRows<T>{y, in.stride_y, s.num_y}, in.dim,
      tile_begin, tile_end, in.metric != PairMetric::kDot, [&](int, float square) { return term(square); },
      [&](int64_t j, float square) {
        const bool meets = j < s.num_y && !(in.drop_mask && in.drop_mask[s.y_row + j]);
        shared.y_bias[j % kPairBlockY] = meets && bias ? bias[s.y_row + j] : 0.f;
        return meets ? term(square) : __uint_as_float(0x7fc00000u);
      },
      fold);
}

}  // namespace tokred
