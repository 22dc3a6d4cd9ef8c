// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// How pairs of tokens are cut into tiles on CUDA (merge/cluster_tiles.cuh): what host code decides.
#pragma once
#include "common/dispatch.h"

namespace tokred {

constexpr int kClusterBlockRows = 64, kClusterBlockCols = 128;  // of a block's tile
constexpr int64_t kClusterMaxSplits = 8;

// Shares of the columns for this many blocks of rows: about four blocks for each of 132 SMs, whose unequal ends then
// cost little. No bit of a result may depend on it.
constexpr int cluster_splits(int64_t row_blocks, int64_t num_cols) {
  const int64_t tiles = ceil_div(num_cols, int64_t{kClusterBlockCols});
  if (row_blocks < 1 || tiles < 1) return 1;
  return static_cast<int>(std::min({tiles, kClusterMaxSplits, ceil_div(int64_t{4 * 132}, row_blocks)}));
}

// Whether rows of dim values lie at multiples of 16 bytes and are as long.
constexpr bool rows_are_aligned(uint64_t address, DType dtype, int64_t dim, int64_t stride_token, int64_t batch_size,
                                int64_t stride_batch) {
  const int64_t bytes = element_size(dtype);
  return (address | static_cast<uint64_t>(dim * bytes) | static_cast<uint64_t>(stride_token * bytes) |
          static_cast<uint64_t>(batch_size > 1 ? stride_batch * bytes : 0)) %
             16 ==
         0;
}

}  // namespace tokred
