// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Keys or values in a cache, dense or paged, for the ops that read them where they lie.
#pragma once
#include "common/dispatch.h"

namespace tokred {

// One launch of K or V, dense or paged: row (batch, kv head, slot) starts at
// data + batch * stride_batch + kv_head * stride_head + (slot >> page_shift) * stride_page + (slot & mask) *
// stride_token. Dense storage is one page of 2^31 tokens per batch entry; pages belong to no batch entry.
struct KvTensor {
  const void* data = nullptr;  // [batch_size, num_kv_heads, kv_len, dim] or [num_pages, page_size, num_kv_heads, dim]
  int64_t dim = 0;
  int64_t stride_batch = 0, stride_head = 0, stride_page = 0, stride_token = 0;  // in elements

  TOKRED_HOST_DEVICE int64_t head_offset(int64_t batch_idx, int64_t kv_head) const {
    return batch_idx * stride_batch + kv_head * stride_head;
  }
  TOKRED_HOST_DEVICE int64_t slot_offset(int32_t slot, int page_shift) const {
    const int32_t in_page = slot & static_cast<int32_t>((uint32_t{1} << page_shift) - 1);
    return static_cast<int64_t>(slot >> page_shift) * stride_page + int64_t{in_page} * stride_token;
  }
};

constexpr int kDensePageShift = 31;

// Where the positions of a batch entry lie. Dense: the slot is the position.
struct KvPages {
  const int32_t* table = nullptr;  // [batch_size, max_pages]; null: dense
  int64_t num_pages = 0, max_pages = 0;
  int shift = kDensePageShift;  // log2(page_size)

  // The slot of a position in [0, max_pages * page_size), -1 where its page does not exist.
  TOKRED_HOST_DEVICE int32_t slot(int64_t batch_idx, int64_t position) const {
    if (!table) return static_cast<int32_t>(position);
    const int64_t page = table[batch_idx * max_pages + (position >> shift)];
    if (page < 0 || page >= num_pages) return -1;
    return static_cast<int32_t>((page << shift) + (position & ((int64_t{1} << shift) - 1)));
  }
};

// Positions of a batch entry, of kv_len at most; may be negative.
TOKRED_HOST_DEVICE int64_t kv_limit(const int32_t* kv_lens, int64_t kv_len, int64_t batch_idx) {
  return kv_lens && kv_lens[batch_idx] < kv_len ? kv_lens[batch_idx] : kv_len;
}

// Whether every row starts at a multiple of 16 bytes and is as long.
inline bool has_wide_rows(const KvTensor& x, DType dtype) {
  const int64_t bytes = element_size(dtype);
  const uint64_t all = reinterpret_cast<uint64_t>(x.data) | static_cast<uint64_t>(x.dim * bytes) |
                       static_cast<uint64_t>(x.stride_batch * bytes) | static_cast<uint64_t>(x.stride_head * bytes) |
                       static_cast<uint64_t>(x.stride_page * bytes) | static_cast<uint64_t>(x.stride_token * bytes);
  return all % 16 == 0;
}

}  // namespace tokred
