// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/list_to_slots.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_heads, num_tables, k, max_pages, page_size;
  bool with_lens = false;
};

template <typename Index>
Results call(const Case& c, const Side& side) {
  Random random(static_cast<uint64_t>(c.k + c.page_size));
  const int64_t entries = c.batch_size * c.num_heads * c.k, tables = c.batch_size * c.num_tables;
  const int64_t capacity = c.max_pages * c.page_size;
  const Buffer<Index> kept_idx(side, random.whole<Index>(entries, -3, capacity + 4));
  const Buffer<int32_t> page_table(side, random.whole<int32_t>(tables * c.max_pages, -1, 50));
  const Buffer<int32_t> kv_lens(side, random.whole<int32_t>(tables, -1, capacity + 2)), slots(side, entries);

  ListToSlotsArgs args{};
  args.kept_idx = {kept_idx.data(), sizeof(Index) == 8};
  args.page_table = page_table.data();
  args.kv_lens = c.with_lens ? kv_lens.data() : nullptr;
  args.slots = slots.data();
  args.batch_size = c.batch_size;
  args.num_heads = c.num_heads;
  args.num_tables = c.num_tables;
  args.k = c.k;
  args.max_pages = c.max_pages;
  args.page_size = c.page_size;
  args.page_shift = (c.page_size & (c.page_size - 1)) == 0 ? __builtin_ctzll(c.page_size) : -1;
  TOKRED_RUN(side, list_to_slots, args);
  return Results().add("slots", slots);
}

void check_all(const Case& c) {
  const std::string what = text(" [", c.batch_size, ", ", c.num_heads, ", ", c.k, "], pages of ", c.page_size);
  check("int32" + what, [&](const Side& side) { return call<int32_t>(c, side); });
  check("int64" + what, [&](const Side& side) { return call<int64_t>(c, side); });
}

}  // namespace

TOKRED_TEST(list_to_slots, sizes) {  // shifts and divisions, one and several blocks of a list
  for (const int64_t page_size : {1, 16, 24}) {
    for (const int64_t k : {1, 255, 256, 257, 700}) {
      check_all({2, 6, 2, k, 7, page_size});
      check_all({2, 6, 1, k, 7, page_size, true});
    }
  }
}
TOKRED_TEST(list_to_slots, empty) {
  check_all({0, 2, 1, 5, 3, 16});
  check_all({2, 0, 0, 5, 3, 16});
  check_all({2, 2, 1, 0, 3, 16});
  check_all({2, 2, 1, 5, 0, 16, true});
}
