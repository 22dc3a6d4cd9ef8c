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
  bool normalize = false;            // then only the scores are compared: nearly equal ones may rank otherwise
  int64_t lead = 0;                  // elements before metric
  int64_t num_src = 0, num_dst = 0;  // of lists, with a few empty slots; 0: parity
  bool weighted = false, grouped = false, ragged = false;
};

int64_t tokens_of_batch(const Case& c) { return c.batch_size * c.num_tokens; }

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens + c.dim));
  const int64_t num_all = tokens_of_batch(c);
  // Dot products of small whole numbers: exact, and full of ties.
  const Buffer<T> metric(
      side, c.normalize ? random.normals<T>(num_all * c.dim) : random.whole<T>(num_all * c.dim, -3, 4), c.lead);
  std::vector<uint8_t> bits = random.whole<uint8_t>(num_all, 0, 100);
  for (uint8_t& bit : bits) bit = bit < c.protect_percent;
  const Buffer<uint8_t> protect(side, bits);
  const Buffer<int64_t> dst_idx(side, num_all), match_idx(side, num_all);
  const Buffer<float> score(side, num_all);
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
  std::vector<int64_t> tokens(static_cast<size_t>(c.batch_size * (c.num_src + c.num_dst)));
  for (size_t i = 0; i < tokens.size(); ++i) {  // sources from the first token on, destinations from the last one back
    const int64_t slot = static_cast<int64_t>(i) % std::max<int64_t>(c.num_src + c.num_dst, 1);
    tokens[i] = slot % 7 == 3 ? -1 : slot < c.num_src ? slot : c.num_tokens - 1 - (slot - c.num_src);
  }
  const Buffer<int64_t> lists(side, tokens);
  const int64_t stride_list = c.num_src + c.num_dst;
  if (c.num_src > 0) {
    args.source = {{lists.data(), true}, c.num_src, stride_list};
    args.destination = {{lists.data() + c.num_src, true}, c.num_dst, stride_list};
  }
  const Buffer<float> weight(side, random.whole<float>(tokens_of_batch(c), 0, 3));
  const Buffer<int32_t> group(side, random.whole<int32_t>(tokens_of_batch(c), 0, 3));
  std::vector<int32_t> lens(static_cast<size_t>(c.batch_size), static_cast<int32_t>(c.num_tokens - c.num_tokens / 3));
  if (!lens.empty()) lens[0] = static_cast<int32_t>(c.num_tokens);
  const Buffer<int32_t> seq_lens(side, lens);
  const Buffer<int32_t> num_kept(side, c.batch_size);
  if (c.weighted) {
    args.weight = weight.data();
    args.offset = 2.f;
  }
  if (c.grouped) args.group = group.data();
  if (c.ragged) {
    args.ragged = true;
    args.threshold = 1.f;
    args.seq_lens = seq_lens.data();
    args.num_kept = num_kept.data();
  }
  const BipartiteMatchPolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.metric));
  const Buffer<uint64_t> partial(side, policy.num_splits * c.batch_size * bipartite_slots(args).num_src);
  args.partial = partial.data();
  TOKRED_RUN(side, bipartite_match, args);
  if (c.normalize) return Results().add("score", score, 1e-5, 1e-5);
  Results results = Results().add("dst_idx", dst_idx).add("match_idx", match_idx).add("score", score);
  return c.ragged ? results.add("num_kept", num_kept) : results;
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
TOKRED_TEST(bipartite_match, lists) {
  for (const MatchOrder order : kOrders) {
    check_all({2, 91, 16, 11, 0, 20, order, false, 0, 40, 30});
    check_all({2, 91, 13, 11, 0, 20, order, false, 0, 40, 30, true, true, true});
  }
  check_all({1, 300, 8, 40, 0, 0, MatchOrder::kIndex, false, 0, 70, 150});
  check_all({1, 30, 8, 0, 0, 0, MatchOrder::kScore, false, 0, 12, 0, false, false, true});
}
TOKRED_TEST(bipartite_match, ragged) {
  for (const MatchOrder order : kOrders) {
    check_all({3, 61, 16, 31, 0, 10, order, false, 0, 0, 0, false, false, true});
    check_all({3, 61, 16, 25, 5, 0, order, false, 0, 0, 0, true, true, true});
  }
  check_all({2, 61, 16, 9, 1, 0, MatchOrder::kIndex, false, 0, 0, 0, true, false, false});
  check_all({2, 61, 16, 9, 0, 0, MatchOrder::kIndex, false, 0, 0, 0, false, true, false});
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
