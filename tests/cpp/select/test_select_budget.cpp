// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_budget.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_heads, num_tokens, budget, max_k;  // packed: num_tokens of all sequences
  int64_t floor = 0;
  double share = 1;
  std::vector<int32_t> cu_seqlens = {};
  int64_t max_seqlen = 0;
  int keep_percent = 0, drop_percent = 0;  // of the tokens are forced, excluded
  bool by_score = false;
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens * 31 + c.budget));
  const bool packed = !c.cu_seqlens.empty();
  const int64_t num_rows = c.batch_size * c.num_heads;
  const int64_t total = packed ? c.num_heads * c.num_tokens : num_rows * c.num_tokens;
  std::vector<T> scores = random.whole<T>(total, -40, 40);  // ties at the cut in most rows
  for (size_t i = 0; i < scores.size(); i += 97) scores[i] = static_cast<T>(i % 2 ? NAN : -0.f);
  const auto mask = [&](int percent) {
    std::vector<uint8_t> bits = random.whole<uint8_t>(total, 0, 100);
    for (uint8_t& bit : bits) bit = bit < percent;
    return bits;
  };
  const Buffer<T> score(side, scores);
  const Buffer<uint8_t> keep(side, mask(c.keep_percent)), drop(side, mask(c.drop_percent)), floors(side, total);
  const Buffer<int32_t> cu_seqlens(side, c.cu_seqlens), num_kept(side, num_rows), counts(side, num_rows);
  const Buffer<int64_t> kept_idx(side, num_rows * c.max_k);

  BudgetArgs args{};
  TopkRows& rows = args.rows;
  rows.score = score.data();
  rows.keep_mask = c.keep_percent ? keep.data() : nullptr;
  rows.drop_mask = c.drop_percent ? drop.data() : nullptr;
  rows.cu_seqlens = packed ? cu_seqlens.data() : nullptr;
  rows.kept_idx = kept_idx.data();
  rows.num_kept = num_kept.data();
  rows.num_rows = num_rows;
  rows.num_heads = c.num_heads;
  rows.num_tokens = c.num_tokens;
  rows.max_seqlen = packed ? c.max_seqlen : c.num_tokens;
  rows.k = c.max_k;
  rows.score_stride = {packed ? 0 : c.num_heads * c.num_tokens, c.num_tokens};
  rows.keep_stride = rows.drop_stride = rows.score_stride;
  rows.dtype = dtype;
  rows.by_score = c.by_score;
  args.total = c.budget * c.num_heads;
  args.floor = c.share < 1 ? 0 : c.floor;
  args.share = c.share;
  args.least = c.share < 1 ? c.floor : 0;
  args.floors = floors.data();
  args.counts = counts.data();
  const Buffer<uint64_t> workspace(side, budget_workspace_bytes(args) / 8);
  rows.workspace = reinterpret_cast<uint32_t*>(workspace.data());

  TOKRED_RUN(side, select_budget, args);
  return Results().add("kept_idx", kept_idx).add("num_kept", num_kept).add("counts", counts);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_heads, ", ", c.num_tokens, "] budget ", c.budget),
            [&](const Side& side) { return call<typename decltype(tag)::type>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(select_budget, sizes) {  // flat, with floors, blended; rows of one block and of chunks
  for (const int64_t n : {1, 40, 300, 8200}) {
    check_all({2, 3, n, n / 3, n});
    check_all({1, 3, n, n / 3, n, n / 9});
    check_all({1, 3, n, n / 3, n / 2, n / 9, 0.7});
  }
}
TOKRED_TEST(select_budget, masks) {
  for (const int keep : {5, 90}) check_all({2, 3, 300, 40, 100, 10, 1, {}, 0, keep, 20});
}
TOKRED_TEST(select_budget, by_score) {
  check_all({1, 2, 300, 40, 80, 10, 1, {}, 0, 0, 0, true});
  check_all({1, 2, 9000, 1000, 2000, 0, 1, {}, 0, 0, 0, true});
}
TOKRED_TEST(select_budget, packed) {
  check_all({4, 2, 500, 60, 120, 20, 1, {0, 20, 20, 400, 500}, 380, 10, 10});
  check_all({2, 2, 500, 60, 60, 20, 0.5, {-3, 200, 900}, 300});  // lengths that lie: nothing is read out of bounds
}
TOKRED_TEST(select_budget, empty) {
  check_all({0, 2, 9, 3, 3});
  check_all({2, 2, 0, 0, 0});
}
