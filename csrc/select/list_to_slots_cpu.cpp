// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/parallel.h"
#include "select/list_to_slots.h"

namespace tokred {

void list_to_slots_cpu(const ListToSlotsArgs& args) {
  // About 2 ns per entry: lists are grouped until a task is worth its start.
  parallel_for(args.batch_size * args.num_heads, 1 + 16384 / (args.k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const SlotList list = slot_list(args, row);
      for (int64_t i = row * args.k; i < (row + 1) * args.k; ++i) {
        args.slots[i] = slot_of(args, list, args.kept_idx[i]);
      }
    }
  });
}

}  // namespace tokred
