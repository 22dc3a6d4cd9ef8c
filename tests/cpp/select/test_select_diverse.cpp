// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_diverse.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_tokens, dim, k;  // packed: num_tokens of all sequences
  DiverseRule rule = DiverseRule::kMaxMin;
  DiverseMetric metric = DiverseMetric::kL2;
  DiverseStart start = DiverseStart::kFarthest;
  bool positions = false, by_index = false;
  int drop_percent = 0;
  int64_t picks_per_step = 1;
  std::vector<int32_t> cu_seqlens = {};
  int64_t max_seqlen = 0;
  int64_t lead = 0;  // elements before x
};

// Squared distances and cosines of what place() writes are exact in float32, so picks do not depend on the order of
// sums, and many tie. Cosine: one coordinate is a power of two, the others are 0.
template <typename T>
std::vector<T> place(const Case& c, int64_t tokens, Random& random) {
  if (c.metric == DiverseMetric::kL2) return random.whole<T>(tokens * c.dim, -2, 3);
  std::vector<T> rows(static_cast<size_t>(tokens * c.dim));
  for (T& value : rows) value = static_cast<T>(0.f);
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t at = i * c.dim + random.below(c.dim);
    rows[static_cast<size_t>(at)] = static_cast<T>(static_cast<float>(1 << random.below(3)));
  }
  return rows;
}

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens * 31 + c.k));
  const bool packed = !c.cu_seqlens.empty();
  const int64_t tokens = packed ? c.num_tokens : c.batch_size * c.num_tokens;
  const bool weighted = c.rule == DiverseRule::kMmr || c.start == DiverseStart::kWeight;
  const Buffer<T> x(side, place<T>(c, tokens, random), c.lead), weight(side, random.whole<T>(tokens, 0, 9));
  std::vector<float> places(static_cast<size_t>(3 * tokens));  // 2 apart, on a line: distances are exact
  for (size_t i = 0; i < places.size(); i += 3) places[i] = 2.f * static_cast<float>(random.below(16));
  const Buffer<float> positions(side, places);
  std::vector<uint8_t> bits = random.whole<uint8_t>(tokens, 0, 100);
  for (uint8_t& bit : bits) bit = bit < c.drop_percent;
  const Buffer<uint8_t> drop_mask(side, bits);
  const Buffer<int64_t> start_idx(side, random.whole<int64_t>(c.batch_size, -1, c.num_tokens + 1));
  const Buffer<int32_t> cu_seqlens(side, c.cu_seqlens), num_kept(side, c.batch_size);
  const Buffer<int64_t> kept_idx(side, c.batch_size * c.k);
  const Buffer<float> value(side, c.batch_size * c.k);

  SelectDiverseArgs args{};
  args.x = x.data();
  if (weighted) args.weight = {weight.data(), dtype};
  args.positions = c.positions ? positions.data() : nullptr;
  args.drop_mask = c.drop_percent ? drop_mask.data() : nullptr;
  args.start_idx = {start_idx.data(), true};
  args.cu_seqlens = packed ? cu_seqlens.data() : nullptr;
  args.kept_idx = kept_idx.data();
  args.num_kept = num_kept.data();
  args.value = value.data();
  args.batch_size = c.batch_size;
  args.num_tokens = c.num_tokens;
  args.max_seqlen = packed ? c.max_seqlen : c.num_tokens;
  args.dim = args.stride_token = c.dim;
  args.k = c.k;
  args.picks_per_step = c.picks_per_step;
  args.stride_batch = packed ? 0 : c.num_tokens * c.dim;
  args.stride_weight = packed ? 0 : c.num_tokens;
  args.lam = args.position_weight = 0.5f;
  args.rule = c.rule;
  args.metric = c.metric;
  args.start = c.start;
  args.by_index = c.by_index;
  args.dtype = dtype;
  const SelectDiversePolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.x));
  const int64_t n = args.max_seqlen, each = c.batch_size * n;
  const Buffer<float> term(side, each), gram(side, policy.gram ? policy.group_size * n * n : 0);
  const Buffer<float> rows(side, policy.gram ? 0 : 3 * each);
  const Buffer<uint32_t> nearest(side, each);
  const Buffer<int32_t> pick(side, policy.gram ? 0 : each);
  args.term = term.data();
  if (c.start == DiverseStart::kFarthest) args.nearest = nearest.data();
  if (policy.gram) {
    args.gram = gram.data();
  } else {
    args.rows = rows.data();
    args.pick = pick.data();
  }
  TOKRED_RUN(side, select_diverse, args);
  const double rtol = c.positions ? 2e-5 : 0;
  return Results().add("kept_idx", kept_idx).add("num_kept", num_kept).add("value", value, rtol, rtol);
}

void check_all(const Case& c, bool f32_alone = false) {
  for (const DType dtype : kDTypes) {
    if (f32_alone && dtype != DType::kF32) continue;
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_tokens, ", ", c.dim, "] keep ", c.k, ", rule ",
                 static_cast<int>(c.rule), ", metric ", static_cast<int>(c.metric), ", start ",
                 static_cast<int>(c.start)),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

constexpr auto kMaxMin = DiverseRule::kMaxMin, kMaxSum = DiverseRule::kMaxSum;
constexpr auto kL2 = DiverseMetric::kL2;
constexpr auto kFarthest = DiverseStart::kFarthest, kFirst = DiverseStart::kFirst;

}  // namespace

TOKRED_TEST(select_diverse, rules) {
  for (const DiverseRule rule : {kMaxMin, kMaxSum, DiverseRule::kMmr}) {
    for (const DiverseMetric metric : {DiverseMetric::kCosine, kL2}) {
      for (const DiverseStart start : {kFarthest, DiverseStart::kWeight, kFirst, DiverseStart::kGiven}) {
        check_all({2, 45, 16, 12, rule, metric, start});
      }
    }
  }
}
TOKRED_TEST(select_diverse, sizes) {  // one tile and several; a token per thread, then four
  for (const int64_t n : {1, 64, 129, 200}) check_all({2, n, 8, (n + 2) / 3});
  check_all({1, 1030, 8, 20, kMaxMin, kL2, kFarthest, false, true});
}
TOKRED_TEST(select_diverse, dims) {  // wide and narrow loads, several steps of the product
  for (const int64_t dim : {1, 3, 8, 72, 200}) {
    check_all({2, 70, dim, 9});
    check_all({1, 70, dim, 9, kMaxMin, kL2, kFarthest, false, false, 0, 1, {}, 0, 1});
  }
}
TOKRED_TEST(select_diverse, masks_steps_positions) {
  check_all({2, 90, 16, 30, kMaxSum, kL2, kFarthest, false, true, 80});  // fewer eligible than k
  check_all({2, 90, 16, 30, DiverseRule::kMmr, kL2, DiverseStart::kWeight, false, true, 10, 4});
  check_all({2, 90, 16, 1, kMaxMin, kL2, kFirst, true});
  check_all({2, 90, 16, 30, kMaxMin, kL2, kFirst, true, false, 10});
}
TOKRED_TEST(select_diverse, packed) {
  check_all({4, 300, 16, 20, kMaxMin, kL2, kFarthest, false, true, 10, 1, {0, 5, 5, 170, 300}, 165});
  check_all({2, 150, 16, 20, kMaxSum, kL2, kFirst, false, false, 0, 1, {-3, 70, 900}, 90});  // lengths that lie
}
TOKRED_TEST(select_diverse, streamed) {  // rows of similarities are made when picked; wide and narrow loads
  check_all({1, 4097, 8, 5, kMaxMin, kL2, kFirst, false, true});
  check_all({1, 4097, 3, 5, kMaxMin, kL2, kFirst});
  check_all({1, 4097, 8, 3, kMaxMin, kL2, kFarthest}, /*f32_alone=*/true);  // all pairs: slow under valgrind
}
TOKRED_TEST(select_diverse, empty) {
  check_all({0, 9, 8, 3});
  check_all({2, 0, 8, 0});
  check_all({2, 9, 8, 0});
  check_all({2, 9, 0, 3});
}
