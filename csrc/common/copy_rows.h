// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Rows picked by an index list, for ops that gather tokens: the plain data and the CPU loop.
#pragma once
#include <cstring>

#include "common/dispatch.h"
#include "common/parallel.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

// Outputs at least this large, more than a core's own cache, go around it: a plain store first reads the line that it
// overwrites, a third of the traffic of a copy.
constexpr int64_t kStreamBytes = int64_t{2} << 20;

// Copies a row, or zeroes it when src is null. stream: non-temporal stores, for 16-byte aligned dst and bytes.
inline void copy_row(char* dst, const char* src, int64_t bytes, bool stream) {
#if defined(__SSE2__)
  if (stream) {
    auto* out = reinterpret_cast<__m128i*>(dst);
    const auto* in = reinterpret_cast<const __m128i*>(src);
    const int64_t count = bytes / 16;
    if (src) {
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) {  // a cache line: one full write-combining buffer
        const __m128i a = _mm_loadu_si128(in + i), b = _mm_loadu_si128(in + i + 1);
        const __m128i c = _mm_loadu_si128(in + i + 2), d = _mm_loadu_si128(in + i + 3);
        _mm_stream_si128(out + i, a);
        _mm_stream_si128(out + i + 1, b);
        _mm_stream_si128(out + i + 2, c);
        _mm_stream_si128(out + i + 3, d);
      }
      for (; i < count; ++i) _mm_stream_si128(out + i, _mm_loadu_si128(in + i));
    } else {
      for (int64_t i = 0; i < count; ++i) _mm_stream_si128(out + i, _mm_setzero_si128());
    }
    return;
  }
#endif
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
  const bool stream =
      rows * t.row_bytes >= kStreamBytes && t.row_bytes % 16 == 0 && reinterpret_cast<uint64_t>(t.dst) % 16 == 0;
  const int64_t grain = 1 + (int64_t{256} << 10) / (t.row_bytes + 16);  // 256 KiB: about 10 us of copying
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    int64_t slot = begin % slots, head = begin / slots % t.num_heads, batch = begin / slots / t.num_heads;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = source(batch, head, slot);
      const char* src = token < 0 ? nullptr : t.src + batch * t.src_batch + head * t.src_head + token * t.src_token;
      char* dst = t.dst + row * t.row_bytes;
      if (t.row_bytes <= 16 && !stream) {  // position ids, masks: no call for a few bytes
        switch (t.row_bytes) {
          case 1:
            *dst = src ? *src : 0;
            break;
          case 2:
            src ? std::memcpy(dst, src, 2) : std::memset(dst, 0, 2);
            break;
          case 4:
            src ? std::memcpy(dst, src, 4) : std::memset(dst, 0, 4);
            break;
          case 8:
            src ? std::memcpy(dst, src, 8) : std::memset(dst, 0, 8);
            break;
          default:
            copy_row(dst, src, t.row_bytes, false);
        }
      } else {
        copy_row(dst, src, t.row_bytes, stream);
      }
      if (++slot == slots) {
        slot = 0;
        if (++head == t.num_heads) {
          head = 0;
          ++batch;
        }
      }
    }
#if defined(__SSE2__)
    if (stream) _mm_sfence();
#endif
  });
}

}  // namespace tokred
