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
};

// The slot of entry `entry` of list `row` (batch and head), -1 for none.
TOKRED_HOST_DEVICE int32_t slot_of(const ListToSlotsArgs& a, int64_t row, int64_t entry) {
  const int64_t table = row / (a.num_heads / a.num_tables);
  const int64_t capacity = a.max_pages * a.page_size;
  const int64_t len = a.kv_lens && a.kv_lens[table] < capacity ? a.kv_lens[table] : capacity;
  const int64_t position = a.kept_idx[row * a.k + entry];
  if (position < 0 || position >= len) return -1;
  const int64_t page = a.page_table[table * a.max_pages + position / a.page_size];
  const int64_t slot = page * a.page_size + position % a.page_size;
  return page >= 0 && slot <= INT32_MAX ? static_cast<int32_t>(slot) : -1;
}

constexpr int kListToSlotsThreads = 256;

void list_to_slots_cpu(const ListToSlotsArgs& args);
int list_to_slots_cuda(const ListToSlotsArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
