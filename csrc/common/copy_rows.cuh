// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Rows picked by an index list, on the GPU. The output of every tensor is cut into units of its widest legal copy; a
// block moves one chunk of consecutive units, so that long rows (hidden states) and rows of a few bytes (positions,
// masks) are both written coalesced, and one launch serves any mix of tensors.
#pragma once

#include "common/copy_rows.h"
#include "common/warp.cuh"

namespace tokred {

constexpr int kCopyThreads = 256;
constexpr int kCopyUnroll = 4;                          // loads in flight per thread: 64 bytes, 16 KiB per block
constexpr int kCopyChunk = kCopyThreads * kCopyUnroll;  // units

inline int64_t copy_units(const RowTensor& t, int64_t rows) { return rows * (t.row_bytes / copy_width(t)); }
inline int64_t copy_chunks(const RowTensor& t, int64_t rows) {
  return ceil_div<int64_t>(copy_units(t, rows), kCopyChunk);
}

// Moves units [first, last) of t; source(batch, head, slot) is as in gather_rows. Every thread of the block calls it.
template <int kBytes, typename Source>
__device__ inline void copy_unit_range(const RowTensor& t, int64_t slots, int64_t first, int64_t last,
                                       const Source& source) {
  using Word = typename detail::Word<kBytes>::type;
  const int64_t per_row = t.row_bytes / kBytes;
  const int step = num_threads_in_block();
  for (int64_t base = first + thread_rank(); base < last; base += int64_t{step} * kCopyUnroll) {
    Word word[kCopyUnroll];
#pragma unroll
    for (int i = 0; i < kCopyUnroll; ++i) {  // all loads first: they are in flight together
      const int64_t unit = base + int64_t{i} * step;
      word[i] = Word{};
      if (unit >= last) continue;
      const int64_t row = unit / per_row, column = unit - row * per_row;
      const int64_t list = row / slots, slot = row - list * slots;
      const int64_t batch = list / t.num_heads, head = list - batch * t.num_heads;
      const int64_t token = source(batch, head, slot);
      if (token >= 0) {
        const char* from = t.src + batch * t.src_batch + head * t.src_head + token * t.src_token;
        word[i] = __ldg(reinterpret_cast<const Word*>(from) + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kCopyUnroll; ++i) {
      const int64_t unit = base + int64_t{i} * step;
      if (unit < last) reinterpret_cast<Word*>(t.dst)[unit] = word[i];
    }
  }
}

template <typename Source>
__device__ inline void copy_range(const RowTensor& t, int width, int64_t slots, int64_t first, int64_t last,
                                  const Source& source) {
  switch (width) {
    case 16:
      return copy_unit_range<16>(t, slots, first, last, source);
    case 8:
      return copy_unit_range<8>(t, slots, first, last, source);
    case 4:
      return copy_unit_range<4>(t, slots, first, last, source);
    case 2:
      return copy_unit_range<2>(t, slots, first, last, source);
    default:
      return copy_unit_range<1>(t, slots, first, last, source);
  }
}

// Which tensor and which of its chunks a block of a launch over several tensors works on.
template <int kMaxTensors>
struct CopyPlan {
  int64_t first_chunk[kMaxTensors + 1];  // of each tensor; the last entry is the grid
  int width[kMaxTensors];
  int num_tensors;
};

template <int kMaxTensors>
CopyPlan<kMaxTensors> plan_copy(const RowTensor* tensors, int num_tensors, int64_t batch_size, int64_t slots) {
  CopyPlan<kMaxTensors> plan{};
  plan.num_tensors = num_tensors;
  for (int t = 0; t < num_tensors; ++t) {
    const int64_t rows = batch_size * tensors[t].num_heads * slots;
    plan.width[t] = copy_width(tensors[t]);
    plan.first_chunk[t + 1] = plan.first_chunk[t] + copy_chunks(tensors[t], rows);
  }
  return plan;
}

// Copies chunk number chunk_idx of the plan. source(tensor, batch, head, slot) is as in gather_rows.
template <int kMaxTensors, typename Source>
__device__ inline void copy_chunk(const CopyPlan<kMaxTensors>& plan, const RowTensor* tensors, int64_t batch_size,
                                  int64_t slots, int64_t chunk_idx, const Source& source) {
  int t = 0;
  while (t + 1 < plan.num_tensors && plan.first_chunk[t + 1] <= chunk_idx) ++t;
  const RowTensor& tensor = tensors[t];
  const int64_t units = batch_size * tensor.num_heads * slots * (tensor.row_bytes / plan.width[t]);
  const int64_t first = (chunk_idx - plan.first_chunk[t]) * kCopyChunk;
  const int64_t last = first + kCopyChunk < units ? first + kCopyChunk : units;
  copy_range(tensor, plan.width[t], slots, first, last,
             [&](int64_t batch, int64_t head, int64_t slot) -> int64_t { return source(t, batch, head, slot); });
}

}  // namespace tokred
