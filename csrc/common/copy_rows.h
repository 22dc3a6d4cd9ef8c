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

// Gathers slots rows per (batch, head) of t. source(batch, head, slot) is the row's token, any id outside
// [0, num_tokens(batch)) already turned into -1 (a zero row), with the batch's first token added for packed tensors.
template <typename Source>
void gather_rows(const RowTensor& t, int64_t batch_size, int64_t slots, const Source& source) {
  const int64_t rows = batch_size * t.num_heads * slots;
  if (rows == 0 || t.row_bytes == 0) return;
  const int64_t grain = 1 + (int64_t{256} << 10) / (t.row_bytes + 16);  // 256 KiB: about 10 us of copying
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    int64_t slot = begin % slots, head = begin / slots % t.num_heads, batch = begin / slots / t.num_heads;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = source(batch, head, slot);
      const char* src = token < 0 ? nullptr : t.src + batch * t.src_batch + head * t.src_head + token * t.src_token;
      char* dst = t.dst + row * t.row_bytes;
      switch (t.row_bytes) {  // position ids, masks: no call for a few bytes
        case 1:
          *dst = src ? *src : 0;
          break;
        case 2:
          copy_row(dst, src, 2);
          break;
        case 4:
          copy_row(dst, src, 4);
          break;
        case 8:
          copy_row(dst, src, 8);
          break;
        default:
          copy_row(dst, src, t.row_bytes);
      }
      if (++slot < slots) continue;
      slot = 0;
      if (++head < t.num_heads) continue;
      head = 0;
      ++batch;
    }
  });
}

}  // namespace tokred
