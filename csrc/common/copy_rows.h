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
TOKRED_HOST_DEVICE int widest_copy(uint64_t all) {  // all: the addresses and strides, or-ed
  all |= 16;
  return static_cast<int>(all & (~all + 1));
}
TOKRED_HOST_DEVICE int copy_width(const RowTensor& t) {
  return widest_copy(reinterpret_cast<uint64_t>(t.src) | reinterpret_cast<uint64_t>(t.dst) | uint64_t(t.row_bytes) |
                     uint64_t(t.src_batch) | uint64_t(t.src_head) | uint64_t(t.src_token));
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
// starts anew in each: eight in turns of 128 bytes took two thirds of the time (4 KiB rows, Zen 4).
constexpr int64_t kRowsAtOnce = 8;

void copy_rows_at_once(char* dst, const char* const* src, int64_t bytes);  // dst: one after the other

// Rows begin..end of one list. row_at(slot) is where a row comes from; null: zeros.
template <typename RowAt>
void copy_wide_rows(char* dst, int64_t row_bytes, int64_t begin, int64_t end, const RowAt& row_at) {
  while (begin < end) {
    const char* rows[kRowsAtOnce];
    const int64_t n = end - begin < kRowsAtOnce ? end - begin : kRowsAtOnce;
    bool full = n == kRowsAtOnce;
    for (int64_t r = 0; r < n; ++r) {
      rows[r] = row_at(begin + r);
      full = full && rows[r];
    }
    if (full) {
      copy_rows_at_once(dst, rows, row_bytes);
    } else {
      for (int64_t r = 0; r < n; ++r) copy_row(dst + r * row_bytes, rows[r], row_bytes);
    }
    dst += n * row_bytes;
    begin += n;
  }
}

// The same for a width known here: position ids, masks, scores. A row costs a cache miss and nothing else, so the
// misses of some rows are begun before the first of them is waited for.
template <int kBytes, typename RowAt>
void copy_small_rows(char* dst, int64_t begin, int64_t end, const RowAt& row_at) {
  constexpr int64_t kAtOnce = 32;
  while (begin < end) {
    const char* rows[kAtOnce];
    const int64_t n = end - begin < kAtOnce ? end - begin : kAtOnce;
    for (int64_t r = 0; r < n; ++r) {
      rows[r] = row_at(begin + r);
      if (rows[r]) __builtin_prefetch(rows[r]);
    }
    for (int64_t r = 0; r < n; ++r) copy_row(dst + r * kBytes, rows[r], kBytes);
    dst += n * kBytes;
    begin += n;
  }
}

// How many rows a piece of parallel copying has at least: 256 KiB, about 10 us.
inline int64_t copy_grain(int64_t row_bytes) { return 1 + (int64_t{256} << 10) / (row_bytes + 16); }

// Fills t.dst; list_at(batch, head) gives the row_at of a list.
template <typename ListAt>
void copy_rows(const RowTensor& t, int64_t batch_size, int64_t slots, const ListAt& list_at) {
  const int64_t rows = batch_size * t.num_heads * slots;
  if (rows == 0 || t.row_bytes == 0) return;
  parallel_for(rows, copy_grain(t.row_bytes), [&](int64_t row, int64_t last) {
    while (row < last) {  // one list's share of the piece
      const int64_t batch = row / slots / t.num_heads, head = row / slots % t.num_heads, begin = row % slots;
      const int64_t end = last - row < slots - begin ? begin + last - row : slots;
      char* dst = t.dst + row * t.row_bytes;
      const auto row_at = list_at(batch, head);
      switch (t.row_bytes) {
        case 1:
          copy_small_rows<1>(dst, begin, end, row_at);
          break;
        case 2:
          copy_small_rows<2>(dst, begin, end, row_at);
          break;
        case 4:
          copy_small_rows<4>(dst, begin, end, row_at);
          break;
        case 8:
          copy_small_rows<8>(dst, begin, end, row_at);
          break;
        default:
          copy_wide_rows(dst, t.row_bytes, begin, end, row_at);
      }
      row += end - begin;
    }
  });
}

// Gathers slots rows per (batch, head) of t. source(batch, head, slot) is the row's token, any id outside
// [0, num_tokens(batch)) already turned into -1 (a zero row), with the batch's first token added for packed tensors.
template <typename Source>
void gather_rows(const RowTensor& t, int64_t batch_size, int64_t slots, const Source& source) {
  copy_rows(t, batch_size, slots, [&](int64_t batch, int64_t head) {
    return [&source, batch, head, src = t.src + batch * t.src_batch + head * t.src_head,
            stride = t.src_token](int64_t slot) -> const char* {
      const int64_t token = source(batch, head, slot);
      return token < 0 ? nullptr : src + token * stride;
    };
  });
}

}  // namespace tokred
