// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Similarities on the CPU, a block of x rows by a panel of y rows at a time, for kernels that fold them as they come.
// A similarity's bits depend on its two rows alone.
#pragma once
#include <vector>

#include "common/dot_panel.h"
#include "common/pair.h"

namespace tokred {

// Rows [begin, end) of a sequence: what is packed once and meets all of y.
struct PairBlock {
  int64_t batch, begin, end;
};
// Blocks of all sequences, of at most 2 MiB packed: they stay near the core while y streams by.
std::vector<PairBlock> pair_blocks(const PairInputs& in);
int64_t pair_block_rows(const PairInputs& in);

// Shares of y for so few blocks that threads would be without work; at least 512 rows of y each.
int64_t pair_shares(int64_t num_blocks, int64_t num_y);

// One thread's tiles.
class PairPanels {
 public:
  explicit PairPanels(const PairInputs& in);
  void pack_x(const PairSequence& s, int64_t begin, int64_t end);
  // [rows packed, dot_columns()]: similarities with rows [first, first + count) of y, count at most dot_columns().
  // bias: of all rows of y, as drop_mask; may be null. NaN past count, and where drop_mask or the groups forbid.
  const float* meet(const PairSequence& s, int64_t first, int64_t count, const float* bias);
  // [rows packed, dot_columns()]: -1 for pairs that meet, 0 for others.
  const int32_t* find_meets(const PairSequence& s, int64_t first, int64_t count);

 private:
  const PairInputs& in_;
  int64_t depth_, rows_ = 0, begin_ = 0;  // depth_: padded
  AlignedBuffer<float> x_, x_square_, y_, panel_, value_;
  AlignedBuffer<int64_t> x_group_;
  AlignedBuffer<int32_t> meets_;
};

}  // namespace tokred
