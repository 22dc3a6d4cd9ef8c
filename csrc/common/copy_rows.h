// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Rows picked by an index list, for ops that gather tokens: the plain data and the CPU loop.
#pragma once
#include <cstring>

#include "common/dispatch.h"
#include "common/parallel.h"

namespace tokred {

// One tensor of a gather, seen as [batch, heads, tokens, row]; a row is contiguous. dst is contiguous.
struct RowTensor {
  const char* src = nullptr;
  char* dst = nullptr;  // [batch, heads, slots, row]
  int64_t row_bytes = 0;
  int64_t num_heads = 1;
  int64_t src_batch = 0, src_head = 0, src_token = 0;  // strides in bytes
};

// Bytes up to 16 that divide every address and stride of t: the widest copy it allows. 1 at least.
TOKRED_HOST_DEVICE int copy_width(const RowTensor& t) {
  uint64_t all = reinterpret_cast<uint64_t>(t.src) | reinterpret_cast<uint64_t>(t.dst) | uint64_t(t.row_bytes) |
                 uint64_t(t.src_batch) | uint64_t(t.src_head) | uint64_t(t.src_token) | 16;
  return static_cast<int>(all & (~all + 1));
}

// Copies a row, or zeroes it when src is null. Plain stores: measured against non-temporal ones, which lose wherever
// the allocator hands out memory that is in a cache (most outputs) or fresh from the kernel (the largest).
inline void copy_row(char* dst, const char* src, int64_t bytes) {
  if (src) {
    std::memcpy(dst, src, static_cast<size_t>(bytes));
  } else {
    std::memset(dst, 0, static_cast<size_t>(bytes));
  }
}

// Rows copied side by side. One row at a time keeps too few of the memory's banks busy, and the hardware's prefetcher
// starts anew in each: four in turns of 256 bytes took two thirds of the time (4 KiB rows, Zen 4).
constexpr int64_t kRowsAtOnce = 4;

void copy_rows_at_once(char* dst, const char* const* src, int64_t bytes);  // dst: one after the other

// Rows begin..end of one list.
template <typename Source>
void gather_wide_rows(char* dst, const char* src, const RowTensor& t, int64_t begin, int64_t end,
                      const Source& source) {
  while (begin < end) {
    const char* rows[kRowsAtOnce];
    const int64_t n = end - begin < kRowsAtOnce ? end - begin : kRowsAtOnce;
    bool full = n == kRowsAtOnce;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t token = source(begin + r);
      rows[r] = token < 0 ? nullptr : src + token * t.src_token;
      full = full && rows[r];
    }
    if (full) {
      copy_rows_at_once(dst, rows, t.row_bytes);
    } else {
      for (int64_t r = 0; r < n; ++r) copy_row(dst + r * t.row_bytes, rows[r], t.row_bytes);
    }
    dst += n * t.row_bytes;
    begin += n;
  }
}

// The same for a width known here: position ids, masks, scores. A row costs a cache miss and nothing
// else, so the loop only has to run ahead of the misses.
template <int kBytes, typename Source>
void gather_small_rows(char* dst, const char* src, int64_t stride, int64_t begin, int64_t end, const Source& source) {
  constexpr int64_t kAhead = 32;
  for (int64_t i = begin; i < end; ++i, dst += kBytes) {
    const int64_t next = source(i + kAhead < end ? i + kAhead : i), token = source(i);
    if (next >= 0) __builtin_prefetch(src + next * stride);
    copy_row(dst, token < 0 ? nullptr : src + token * stride, kBytes);
  }
}

// Gathers slots rows per (batch, head) of t. source(batch, head, slot) is the row's token, any id outside
// [0, num_tokens(batch)) already turned into -1 (a zero row), with the batch's first token added for packed tensors.
template <typename Source>
void gather_rows(const RowTensor& t, int64_t batch_size, int64_t slots, const Source& source) {
  const int64_t rows = batch_size * t.num_heads * slots;
  if (rows == 0 || t.row_bytes == 0) return;
  const int64_t grain = 1 + (int64_t{256} << 10) / (t.row_bytes + 16);  // 256 KiB: about 10 us of copying
  parallel_for(rows, grain, [&](int64_t row, int64_t last) {
    while (row < last) {  // one list's share of the piece
      const int64_t batch = row / slots / t.num_heads, head = row / slots % t.num_heads, begin = row % slots;
      const int64_t end = last - row < slots - begin ? begin + last - row : slots;
      const char* src = t.src + batch * t.src_batch + head * t.src_head;
      char* dst = t.dst + row * t.row_bytes;
      const auto token_of = [&](int64_t slot) { return source(batch, head, slot); };
      switch (t.row_bytes) {
        case 1:
          gather_small_rows<1>(dst, src, t.src_token, begin, end, token_of);
          break;
        case 2:
          gather_small_rows<2>(dst, src, t.src_token, begin, end, token_of);
          break;
        case 4:
          gather_small_rows<4>(dst, src, t.src_token, begin, end, token_of);
          break;
        case 8:
          gather_small_rows<8>(dst, src, t.src_token, begin, end, token_of);
          break;
        default:
          gather_wide_rows(dst, src, t, begin, end, token_of);
      }
      row += end - begin;
    }
  });
}

}  // namespace tokred
