// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// What a block does with a row of scores when it also copies the tokens that it keeps.
#pragma once

#include "common/copy_rows.cuh"
#include "common/topk_rows.cuh"
#include "compact/prune_topk.h"

namespace tokred {

// Selects from row, the scores of a batch entry, and copies part number split of splits of the kept rows; the first one
// writes the list, too. kept: k int32 in shared memory. Called by all threads of the block.
template <int kItems, typename T>
__device__ inline void block_select_and_copy(const PruneTopkArgs& args, int64_t batch_idx, const TopkRow<T>& row,
                                             int split, int splits, BlockTeam& team, int* kept) {
  const int k = static_cast<int>(args.rows.k);
  const int count = select_in_row<T, kItems>(row, k, team, [&](int slot, int token) { kept[slot] = token; });
  for (int slot = count + static_cast<int>(threadIdx.x); slot < k; slot += static_cast<int>(blockDim.x))
    kept[slot] = -1;
  __syncthreads();  // the list is whole
  if (split == 0) {
    for (int slot = static_cast<int>(threadIdx.x); slot < k; slot += static_cast<int>(blockDim.x)) {
      args.rows.kept_idx[batch_idx * k + slot] = kept[slot];
    }
    if (args.rows.num_kept && threadIdx.x == 0) args.rows.num_kept[batch_idx] = count;
  }
  const int64_t begin = topk_span(args.rows, batch_idx).begin;
  for (int t = 0; t < args.num_tensors; ++t) {
    const RowTensor& tensor = args.tensors[t];
    const int width = copy_width(tensor);
    const int64_t units = k * (tensor.row_bytes / width), share = ceil_div<int64_t>(units, splits);
    const int64_t first = split * share, last = first + share < units ? first + share : units;
    copy_range(tensor, width, k, batch_idx * units + first, batch_idx * units + last,
               [&](int64_t, int64_t, int64_t slot) -> int64_t { return kept[slot] < 0 ? -1 : begin + kept[slot]; });
  }
}

}  // namespace tokred
