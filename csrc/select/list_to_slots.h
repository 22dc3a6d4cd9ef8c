// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"

namespace tokred {

struct ListToSlotsArgs {
  IndexPtr kept_idx;                             // [batch_size, num_heads, k]
  const int32_t* page_table;                     // [batch_size, num_tables, max_pages]
  const int32_t* kv_lens;                        // [batch_size, num_tables]; null: all pages are full
  int32_t* slots;                                // [batch_size, num_heads, k]
  int64_t batch_size, num_heads, num_tables, k;  // num_tables divides num_heads
  int64_t max_pages, page_size;
  int page_shift;  // page_size is 2^page_shift; -1: it is no power of two
};

// What the entries of one list share.
struct SlotList {
  const int32_t* pages;
  int64_t len;  // positions in [0, len) have a slot
};
TOKRED_HOST_DEVICE SlotList slot_list(const ListToSlotsArgs& a, int64_t row) {
  const int64_t table = row / (a.num_heads / a.num_tables), capacity = a.max_pages * a.page_size;
  return {a.page_table + table * a.max_pages, a.kv_lens && a.kv_lens[table] < capacity ? a.kv_lens[table] : capacity};
}

// The slot of a position, -1 for none.
TOKRED_HOST_DEVICE int32_t slot_of(const ListToSlotsArgs& a, const SlotList& list, int64_t position) {
  if (position < 0 || position >= list.len) return -1;
  // A shift where it will do: dividing costs more than all the rest.
  const int64_t index = a.page_shift >= 0 ? position >> a.page_shift : position / a.page_size;
  const int64_t page = list.pages[index], slot = (page - index) * a.page_size + position;
  return page >= 0 && slot <= INT32_MAX ? static_cast<int32_t>(slot) : -1;
}

constexpr int kListToSlotsThreads = 256;

void list_to_slots_cpu(const ListToSlotsArgs& args);
int list_to_slots_cuda(const ListToSlotsArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
