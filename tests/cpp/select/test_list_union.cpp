// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/list_union.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

template <typename Index>
Results call(int64_t num_unions, int64_t members, int64_t kv_len, const Side& side) {
  Random random(static_cast<uint64_t>(members + kv_len));
  const int64_t size = std::min(members, kv_len);
  std::vector<Index> lists = random.whole<Index>(num_unions * members, -2, kv_len + 3);
  for (size_t i = 0; i < lists.size(); i += 5) lists[i] = static_cast<Index>(kv_len - 1);  // many times, and the last
  const Buffer<Index> kept_idx(side, lists);
  const Buffer<int64_t> union_idx(side, num_unions * size);
  const Buffer<int32_t> num_union(side, num_unions);

  ListUnionArgs args{};
  args.kept_idx = {kept_idx.data(), sizeof(Index) == 8};
  args.union_idx = union_idx.data();
  args.num_union = num_union.data();
  args.num_unions = num_unions;
  args.members = members;
  args.size = size;
  args.kv_len = kv_len;
  TOKRED_RUN(side, list_union, args);
  return Results().add("union_idx", union_idx).add("num_union", num_union);
}

void check_all(int64_t num_unions, int64_t members, int64_t kv_len) {
  const std::string what = text(" ", num_unions, " unions of ", members, " in ", kv_len);
  check("int32" + what, [&](const Side& side) { return call<int32_t>(num_unions, members, kv_len, side); });
  check("int64" + what, [&](const Side& side) { return call<int64_t>(num_unions, members, kv_len, side); });
}

}  // namespace

TOKRED_TEST(list_union, sizes) {  // a word of bits, a tile of a block's words
  for (const int64_t kv_len : {1, 31, 32, 33, 64, 65, 500, 16384, 16385}) {
    for (const int64_t members : {1, 33, 700}) check_all(3, members, kv_len);
  }
}
TOKRED_TEST(list_union, spans) {  // one, and a second one of a word and of many
  for (const int64_t kv_len : {kListUnionSpan, kListUnionSpan + 1, 2 * kListUnionSpan + 99}) check_all(2, 900, kv_len);
}
TOKRED_TEST(list_union, empty) {
  check_all(0, 5, 9);
  check_all(2, 0, 9);
  check_all(2, 5, 0);
}
