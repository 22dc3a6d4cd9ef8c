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
constexpr int kCopyBlocksPerSm = 4;                     // 64 registers; 64 KiB in flight per SM
constexpr int kCopyChunk = kCopyThreads * kCopyUnroll;  // units

// T is RowTensor, or adds to it what else decides copy_width.
template <typename T>
int64_t copy_units(const T& t, int64_t rows) {
  return rows * (t.row_bytes / copy_width(t));
}
template <typename T>
int64_t copy_chunks(const T& t, int64_t rows) {
  return ceil_div<int64_t>(copy_units(t, rows), kCopyChunk);
}

// Where a unit of an output lies, as digits of its number, the column fastest. Divisions cost as much as the rest of
// the copy, so a thread divides once and from then on adds its stride digit by digit.
struct UnitPlace {
  int64_t column;
  int slot, head, batch;
};
struct UnitSizes {  // none is 0; copy_fits
  int64_t columns;
  int slots, heads;

  template <typename U>  // unsigned, holds unit
  __device__ UnitPlace place(U unit) const {
    const bool inside = static_cast<uint64_t>(columns) > unit;
    const U row = inside ? 0 : unit / static_cast<U>(columns);
    const U list = row / static_cast<U>(slots), batch = list / static_cast<U>(heads);
    return {static_cast<int64_t>(inside ? unit : unit - row * static_cast<U>(columns)),
            static_cast<int>(row - list * static_cast<U>(slots)),
            static_cast<int>(list - batch * static_cast<U>(heads)), static_cast<int>(batch)};
  }
  __device__ void advance(UnitPlace& at, const UnitPlace& stride) const {
    at.column += stride.column;
    const bool next_slot = at.column >= columns;
    at.column -= next_slot ? columns : 0;
    const unsigned slot = static_cast<unsigned>(at.slot) + static_cast<unsigned>(stride.slot) + next_slot;
    const bool next_head = slot >= static_cast<unsigned>(slots);
    at.slot = static_cast<int>(slot - (next_head ? static_cast<unsigned>(slots) : 0u));
    const unsigned head = static_cast<unsigned>(at.head) + static_cast<unsigned>(stride.head) + next_head;
    const bool next_batch = head >= static_cast<unsigned>(heads);
    at.head = static_cast<int>(head - (next_batch ? static_cast<unsigned>(heads) : 0u));
    at.batch += stride.batch + next_batch;
  }
};

// Whether the digits of t's units fit UnitPlace.
inline bool copy_fits(const RowTensor& t, int64_t batch_size, int64_t slots) {
  return batch_size <= INT32_MAX && t.num_heads <= INT32_MAX && slots <= INT32_MAX;
}

// Where a unit of the output comes from is the business of Rows:
//   Row find(batch, head, slot, byte, inside)  reads ids. Past the end inside is false and the place is the first slot,
//                                              which is there: no branch comes between the loads.
//   Word load<kBytes>(Row)                     the unit, or zeros.
// These are the rows that source(batch, head, slot) names, as in gather_rows.
template <typename Source>
struct GatheredRows {
  const RowTensor& t;
  const Source& source;

  struct Row {
    const char* from;
    int64_t token;
  };
  __device__ Row find(int64_t batch, int64_t head, int64_t slot, int64_t byte, bool inside) const {
    const int64_t token = source(inside ? batch : 0, inside ? head : 0, inside ? slot : 0);
    return {t.src + batch * t.src_batch + head * t.src_head + byte, inside ? token : -1};
  }
  template <int kBytes>
  __device__ typename detail::Word<kBytes>::type load(const Row& row) const {
    using Word = typename detail::Word<kBytes>::type;
    return row.token >= 0 ? __ldg(reinterpret_cast<const Word*>(row.from + row.token * t.src_token)) : Word{};
  }
};

// Writes units [first, last) of t's output. Every thread of the block calls it.
template <int kBytes, typename Rows>
__device__ inline void copy_unit_range(const RowTensor& t, int64_t slots, int64_t first, int64_t last,
                                       const Rows& rows) {
  using Word = typename detail::Word<kBytes>::type;
  const int step = num_threads_in_block();
  int64_t unit = first + thread_rank();
  if (unit >= last) return;  // from here on t has units, and no size is 0
  const UnitSizes sizes{t.row_bytes / kBytes, static_cast<int>(slots), static_cast<int>(t.num_heads)};
  const UnitPlace stride = sizes.place(static_cast<uint32_t>(step));
  UnitPlace at = sizes.place(static_cast<uint64_t>(unit));
  for (; unit < last; unit += int64_t{step} * kCopyUnroll) {
    typename Rows::Row row[kCopyUnroll];
#pragma unroll
    for (int i = 0; i < kCopyUnroll; ++i) {  // all ids, then all rows: each kind is in flight together
      row[i] = rows.find(at.batch, at.head, at.slot, at.column * kBytes, unit + int64_t{i} * step < last);
      sizes.advance(at, stride);
    }
    Word word[kCopyUnroll];
#pragma unroll
    for (int i = 0; i < kCopyUnroll; ++i) word[i] = rows.template load<kBytes>(row[i]);
#pragma unroll
    for (int i = 0; i < kCopyUnroll; ++i) {
      const int64_t to = unit + int64_t{i} * step;
      if (to < last) reinterpret_cast<Word*>(t.dst)[to] = word[i];
    }
  }
}

template <typename Rows>
__device__ inline void copy_rows_range(const RowTensor& t, int width, int64_t slots, int64_t first, int64_t last,
                                       const Rows& rows) {
  switch (width) {
    case 16:
      return copy_unit_range<16>(t, slots, first, last, rows);
    case 8:
      return copy_unit_range<8>(t, slots, first, last, rows);
    case 4:
      return copy_unit_range<4>(t, slots, first, last, rows);
    case 2:
      return copy_unit_range<2>(t, slots, first, last, rows);
    default:
      return copy_unit_range<1>(t, slots, first, last, rows);
  }
}

template <typename Source>
__device__ inline void copy_range(const RowTensor& t, int width, int64_t slots, int64_t first, int64_t last,
                                  const Source& source) {
  copy_rows_range(t, width, slots, first, last, GatheredRows<Source>{t, source});
}

// Which tensor and which of its chunks a block of a launch over several tensors works on.
template <int kMaxTensors>
struct CopyPlan {
  int64_t first_chunk[kMaxTensors + 1];  // of each tensor; the last entry is the grid
  int width[kMaxTensors];
  int num_tensors;
  bool fits;  // else there is no launch for these sizes
};

template <int kMaxTensors, typename T>
CopyPlan<kMaxTensors> plan_copy(const T* tensors, int num_tensors, int64_t batch_size, int64_t slots) {
  CopyPlan<kMaxTensors> plan{};
  plan.num_tensors = num_tensors;
  plan.fits = true;
  for (int t = 0; t < num_tensors; ++t) {
    const int64_t rows = batch_size * tensors[t].num_heads * slots;
    plan.width[t] = copy_width(tensors[t]);
    plan.first_chunk[t + 1] = plan.first_chunk[t] + copy_chunks(tensors[t], rows);
    plan.fits = plan.fits && copy_fits(tensors[t], batch_size, slots) && plan.first_chunk[t + 1] <= INT32_MAX;
  }
  return plan;
}

// Calls body(tensor, width, first, last) for the units of chunk number chunk_idx of the plan.
template <int kMaxTensors, typename T, typename Body>
__device__ inline void visit_chunk(const CopyPlan<kMaxTensors>& plan, const T* tensors, int64_t batch_size,
                                   int64_t slots, int64_t chunk_idx, const Body& body) {
  int t = 0;
  while (t + 1 < plan.num_tensors && plan.first_chunk[t + 1] <= chunk_idx) ++t;
  const int64_t units = batch_size * tensors[t].num_heads * slots * (tensors[t].row_bytes / plan.width[t]);
  const int64_t first = (chunk_idx - plan.first_chunk[t]) * kCopyChunk;
  body(t, plan.width[t], first, min(first + kCopyChunk, units));
}

// Copies chunk number chunk_idx of the plan. source(tensor, batch, head, slot) is as in gather_rows.
template <int kMaxTensors, typename Source>
__device__ inline void copy_chunk(const CopyPlan<kMaxTensors>& plan, const RowTensor* tensors, int64_t batch_size,
                                  int64_t slots, int64_t chunk_idx, const Source& source) {
  visit_chunk(plan, tensors, batch_size, slots, chunk_idx, [&](int t, int width, int64_t first, int64_t last) {
    copy_range(tensors[t], width, slots, first, last,
               [&](int64_t batch, int64_t head, int64_t slot) -> int64_t { return source(t, batch, head, slot); });
  });
}

}  // namespace tokred
