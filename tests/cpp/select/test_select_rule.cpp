// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_rule.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_heads, num_tokens, max_k;  // packed: num_tokens of all sequences
  CutRule rule;
  double value;
  int64_t min_k = 0;
  std::vector<int32_t> cu_seqlens = {};
  int64_t max_seqlen = 0;
  int keep_percent = 0, drop_percent = 0;  // of the tokens are forced, excluded
  int64_t keep_first = 0, keep_last = 0;
  bool strict = false, softmax = false, per_row = false, weighted = false, dual = false, by_score = false;
  int32_t stride = 0;
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens * 31 + c.max_k));
  const bool packed = !c.cu_seqlens.empty();
  const int64_t num_rows = c.batch_size * c.num_heads;
  const int64_t total = packed ? c.num_heads * c.num_tokens : num_rows * c.num_tokens;
  std::vector<T> scores = random.whole<T>(total, -9, 40);  // ties at the cut in most rows
  for (size_t i = 0; i < scores.size(); i += 97) scores[i] = static_cast<T>(i % 2 ? NAN : -0.f);
  const auto mask = [&](int percent) {
    std::vector<uint8_t> bits = random.whole<uint8_t>(total, 0, 100);
    for (uint8_t& bit : bits) bit = bit < percent;
    return bits;
  };
  const Buffer<T> score(side, scores), other(side, random.whole<T>(total, 0, 40));
  const Buffer<uint8_t> keep(side, mask(c.keep_percent)), drop(side, mask(c.drop_percent));
  const Buffer<int32_t> cu_seqlens(side, c.cu_seqlens), num_kept(side, num_rows);
  const Buffer<int64_t> weight(side, random.whole<int64_t>(total, -1, 5)), kept_idx(side, num_rows * c.max_k);
  const Buffer<float> values(side, random.whole<float>(num_rows, 0, 3));

  CutRows args{};
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
  rows.keep_first = c.keep_first;
  rows.keep_last = c.keep_last;
  rows.score_stride = {packed ? 0 : c.num_heads * c.num_tokens, c.num_tokens};
  rows.keep_stride = rows.drop_stride = args.other_stride = args.weight_stride = rows.score_stride;
  rows.dtype = dtype;
  rows.by_score = c.by_score;
  args.rule = c.rule;
  args.rounding = Rounding::kRound;
  args.strict = c.strict;
  args.softmax = c.softmax;
  args.exp2_scale = 1.4426950408889634 / 5 * 0x1p30;
  args.value = c.value;
  if (c.per_row) args.row_value = values.data();
  args.min_k = c.min_k;
  if (c.dual) {
    args.other = other.data();
    args.other_value = 38.5;
    if (c.per_row) args.row_other_value = values.data();
  }
  if (c.weighted) args.weight = {weight.data(), true};
  args.stride = c.stride;
  args.offset = 1;
  args.seed = 17;
  args.rows_per_group = 1;
  const Buffer<uint64_t> workspace(side, cut_workspace_bytes(args, choose_policy(args)) / 8);
  rows.workspace = reinterpret_cast<uint32_t*>(workspace.data());

  TOKRED_RUN(side, select_rule, args);
  return Results().add("kept_idx", kept_idx).add("num_kept", num_kept);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_heads, ", ", c.num_tokens, "] at most ", c.max_k,
                 " rule ", static_cast<int>(c.rule)),
            [&](const Side& side) { return call<typename decltype(tag)::type>(c, dtype, side); });
    });
  }
}

Case of(CutRule rule, double value, int64_t num_tokens, int64_t max_k) {
  return {1, 2, num_tokens, max_k, rule, value};
}

}  // namespace

TOKRED_TEST(select_rule, rules) {  // in one block, and by chunks
  for (const int64_t n : {1, 31, 300, 9000}) {
    check_all(of(CutRule::kThreshold, 30.5, n, n));
    Case c = of(CutRule::kThreshold, 30, n, n / 2);
    c.strict = c.dual = c.per_row = true;
    check_all(c);
    c = of(CutRule::kQuantile, 0.7, n, n);
    check_all(c);
    c.weighted = c.strict = true;
    check_all(c);
    check_all(of(CutRule::kIqr, 0.1, n, n));
    c = of(CutRule::kMass, 0.5, n, n);
    check_all(c);
    c.softmax = c.strict = true;
    c.min_k = n / 2;
    check_all(c);
    check_all(of(CutRule::kShare, 0.35, n, n));
    c = of(CutRule::kThreshold, NAN, n, n);
    c.stride = 7;
    check_all(c);
    c = of(CutRule::kLottery, 0.2, n, n);
    check_all(c);
    c.softmax = c.per_row = true;
    check_all(c);
  }
}
TOKRED_TEST(select_rule, bounds) {
  for (const int64_t n : {200, 8500}) {
    for (const CutRule rule : {CutRule::kThreshold, CutRule::kMass, CutRule::kIqr, CutRule::kLottery}) {
      Case c = of(rule, 0.6, n, n / 5);
      c.min_k = n / 5;
      check_all(c);
      c.keep_percent = 5;
      c.drop_percent = 30;
      c.keep_first = 2;
      c.keep_last = 9;
      check_all(c);
      c.keep_percent = 40;  // more than may be kept: they alone compete
      check_all(c);
      c.drop_percent = 100;
      check_all(c);
    }
  }
}
TOKRED_TEST(select_rule, by_score) {  // in shared memory, in launches of their own, merged
  for (const int64_t n : {300, 8192, 9000}) {
    for (const int64_t k : {int64_t{50}, n}) {
      Case c = of(CutRule::kThreshold, 3, n, k);
      c.by_score = true;
      check_all(c);
    }
  }
}
TOKRED_TEST(select_rule, packed) {
  Case c{4, 2, 500, 400, CutRule::kMass, 0.7, 0, {0, 20, 20, 400, 500}, 380, 10, 10, 1, 1};
  check_all(c);
  check_all({2, 2, 500, 60, CutRule::kQuantile, 0.4, 0, {-3, 200, 900}, 300});  // lengths that lie
  check_all({2, 1, 9300, 9000, CutRule::kIqr, 0.1, 0, {0, 300, 9300}, 9000});
}
TOKRED_TEST(select_rule, empty) {
  check_all({0, 2, 9, 3, CutRule::kIqr, 1});
  check_all({2, 2, 0, 0, CutRule::kMass, 0.5});
  check_all(of(CutRule::kShare, 0.5, 20, 0));
}
