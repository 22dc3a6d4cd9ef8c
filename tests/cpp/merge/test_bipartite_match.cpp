// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/bipartite_match.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_tokens, dim, r;
  int64_t num_protected = 0;
  int protect_percent = 0;
  MatchOrder order = MatchOrder::kIndex;
  bool normalize = false;  // then only the scores are compared: nearly equal ones may rank otherwise
  int64_t lead = 0;        // elements before metric
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens + c.dim));
  const int64_t tokens = c.batch_size * c.num_tokens;
  // Dot products of small whole numbers: exact, and full of ties.
  const Buffer<T> metric(side, c.normalize ? random.normals<T>(tokens * c.dim) : random.whole<T>(tokens * c.dim, -3, 4),
                         c.lead);
  std::vector<uint8_t> bits = random.whole<uint8_t>(tokens, 0, 100);
  for (uint8_t& bit : bits) bit = bit < c.protect_percent;
  const Buffer<uint8_t> protect(side, bits);
  const Buffer<int64_t> dst_idx(side, tokens), match_idx(side, tokens);
  const Buffer<float> score(side, tokens);
  BipartiteMatchArgs args{};
  args.metric = metric.data();
  args.protect = c.protect_percent ? protect.data() : nullptr;
  args.dst_idx = dst_idx.data();
  args.match_idx = match_idx.data();
  args.score = score.data();
  args.batch_size = c.batch_size;
  args.num_tokens = c.num_tokens;
  args.dim = c.dim;
  args.stride_batch = c.num_tokens * c.dim;
  args.stride_token = c.dim;
  args.r = c.r;
  args.num_protected = c.num_protected;
  args.eps = 1e-12f;
  args.normalize = c.normalize;
  args.order = c.order;
  args.dtype = dtype;
  const BipartiteMatchPolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.metric));
  const Buffer<uint64_t> partial(
      side, policy.num_splits * c.batch_size * bipartite_sets(c.num_tokens, c.num_protected).candidate_src());
  args.partial = partial.data();
  TOKRED_RUN(side, bipartite_match, args);
  if (c.normalize) return Results().add("score", score, 1e-5, 1e-5);
  return Results().add("dst_idx", dst_idx).add("match_idx", match_idx).add("score", score);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_tokens, ", ", c.dim, "] r ", c.r, " order ",
                 static_cast<int>(c.order)),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

constexpr MatchOrder kOrders[] = {MatchOrder::kIndex, MatchOrder::kGrouped, MatchOrder::kScore};

}  // namespace

TOKRED_TEST(bipartite_match, orders) {
  for (const MatchOrder order : kOrders) {
    check_all({2, 61, 16, 11, 0, 0, order});
    check_all({2, 62, 16, 31, 0, 0, order});
    check_all({2, 61, 16, 9, 7, 30, order});
    check_all({2, 61, 16, 9, 0, 100, order});  // no free destination
  }
}
TOKRED_TEST(bipartite_match, dims) {  // wide and narrow loads, one step of the depth and several
  for (const int64_t dim : {1, 7, 64, 136}) check_all({1, 70, dim, 20});
  check_all({1, 70, 64, 20, 0, 0, MatchOrder::kIndex, false, 1});
}
TOKRED_TEST(bipartite_match, cosine) {
  check_all({2, 61, 40, 11, 0, 0, MatchOrder::kIndex, true});
  check_all({2, 61, 13, 11, 1, 20, MatchOrder::kScore, true});
}
TOKRED_TEST(bipartite_match, splits) {  // several shares of the destinations, blocks of sources, ranks of blocks
  for (const MatchOrder order : kOrders) check_all({1, 601, 8, 200, 0, 10, order});
}
TOKRED_TEST(bipartite_match, long_rows) {  // 1, 4 and no keys of a thread in registers
  check_all({1, 1200, 4, 500});
#ifdef TOKRED_TEST_DEVICE  // the product takes the other flavour's valgrind a minute
  check_all({1, 2060, 4, 900});
  check("8200 tokens", [](const Side& side) { return call<c10::Half>({1, 8200, 4, 3000, 0, 1}, DType::kF16, side); });
#endif
}
TOKRED_TEST(bipartite_match, empty) {
  for (const MatchOrder order : kOrders) {
    check_all({0, 20, 8, 3, 0, 0, order});
    check_all({2, 0, 8, 0, 0, 0, order});
    check_all({2, 1, 8, 0, 0, 0, order});
    check_all({2, 2, 8, 1, 0, 0, order});
    check_all({2, 20, 0, 3, 0, 0, order});
    check_all({2, 20, 8, 0, 20, 0, order});
  }
}
