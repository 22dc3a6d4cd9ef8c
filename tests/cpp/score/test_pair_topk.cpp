// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/pair_topk.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_x, num_y, dim, k;
  PairMetric metric = PairMetric::kDot;
  bool rules = false;   // bias, drop_mask, groups, exclude_self
  bool shared = false;  // one y for the whole batch
  bool packed = false;  // num_x and num_y of each sequence, and one row less in every second
  int64_t lead = 0;     // elements before x
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_x + c.num_y + c.dim));
  std::vector<int32_t> ends_x{0}, ends_y{0};
  for (int32_t b = 0; b < c.batch_size; ++b) {
    ends_x.push_back(ends_x.back() + static_cast<int32_t>(c.num_x - b % 2));
    ends_y.push_back(ends_y.back() + static_cast<int32_t>(c.num_y - b % 2));
  }
  const int64_t total_x = c.packed ? ends_x.back() : c.batch_size * c.num_x;
  const int64_t total_y = c.packed ? ends_y.back() : c.shared ? c.num_y : c.batch_size * c.num_y;
  // Similarities of small whole numbers: exact, and full of ties.
  const Buffer<T> x(side, random.whole<T>(total_x * c.dim, -3, 4), c.lead);
  const Buffer<T> y(side, random.whole<T>(total_y * c.dim, -3, 4));
  const Buffer<float> bias(side, random.whole<float>(total_y, -5, 6));
  const Buffer<uint8_t> drop_mask(side, random.whole<uint8_t>(total_y, 0, 2));
  const Buffer<int64_t> x_group(side, random.whole<int64_t>(total_x, 0, 3));
  const Buffer<int64_t> y_group(side, random.whole<int64_t>(total_y, 0, 3));
  const Buffer<int32_t> cu_x(side, ends_x), cu_y(side, ends_y);
  const Buffer<float> value(side, total_x * c.k);
  const Buffer<int64_t> idx(side, total_x * c.k);
  PairTopkArgs args{};
  PairInputs& in = args.in;
  in.x = x.data();
  in.y = y.data();
  in.batch_size = c.batch_size;
  in.num_x = c.packed ? total_x : c.num_x;
  in.num_y = c.packed ? total_y : c.num_y;
  in.dim = in.stride_x = in.stride_y = c.dim;
  in.stride_x_batch = c.packed ? 0 : c.num_x * c.dim;
  in.stride_y_batch = c.packed || c.shared ? 0 : c.num_y * c.dim;
  in.stride_y_list = c.packed || c.shared ? 0 : c.num_y;
  if (c.packed) {
    in.cu_x = cu_x.data();
    in.cu_y = cu_y.data();
  }
  if (c.rules) {
    args.bias = bias.data();
    in.drop_mask = drop_mask.data();
    in.x_group = {x_group.data(), true};
    in.y_group = {y_group.data(), true};
    in.exclude_self = true;
  }
  in.metric = c.metric;
  in.dtype = dtype;
  args.value = value.data();
  args.idx = idx.data();
  args.k = c.k;
  const Buffer<uint64_t> partial(side, pair_topk_partial_size(args, choose_policy(args)));
  args.partial = partial.data();
  TOKRED_RUN(side, pair_topk, args);
  if (c.metric == PairMetric::kCosine) return Results().add("value", value, 1e-5, 1e-5);  // near ties may swap
  return Results().add("value", value).add("idx", idx);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_x, " x ", c.num_y, ", ", c.dim, "] k ", c.k),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(pair_topk, metrics) {
  for (const PairMetric metric : {PairMetric::kCosine, PairMetric::kDot, PairMetric::kL2}) {
    check_all({2, 20, 45, 24, 1, metric});
    check_all({2, 20, 45, 24, 6, metric});
  }
}
TOKRED_TEST(pair_topk, dims) {  // wide and narrow loads, one step of the depth and several
  for (const int64_t dim : {1, 7, 64, 136}) check_all({1, 70, 30, dim, 2});
  check_all({1, 70, 30, 64, 1, PairMetric::kDot, false, false, false, 1});
}
TOKRED_TEST(pair_topk, rules) {
  for (const int64_t k : {1, 5}) {
    check_all({2, 30, 50, 8, k, PairMetric::kL2, true});
    check_all({2, 30, 50, 8, k, PairMetric::kDot, true, true});
    check_all({3, 30, 50, 8, k, PairMetric::kDot, true, false, true});
  }
}
TOKRED_TEST(pair_topk, passes) { check_all({1, 10, 150, 4, 75}); }  // of 32 places
TOKRED_TEST(pair_topk, shares) {                                    // of y, on both devices; few and many to merge
  for (const int64_t k : {1, 9, 25}) {
    check_all({2, 3, 1200, 4, k, PairMetric::kDot, false, true});
    check_all({1, 70, 300, 4, k});
  }
}
TOKRED_TEST(pair_topk, one_share) {  // of several tiles: a list that is full meets few that enter it
  check("bfloat16", [](const Side& side) { return call<c10::BFloat16>({270, 1, 400, 4, 25}, DType::kBF16, side); });
}
TOKRED_TEST(pair_topk, empty) {
  check_all({0, 20, 30, 8, 3});
  check_all({2, 0, 30, 8, 3});
  check_all({2, 20, 30, 0, 3});
  check_all({2, 20, 30, 8, 0});
  check_all({2, 20, 0, 8, 0});
  check_all({2, 1, 1, 8, 3, PairMetric::kDot, false, false, true});  // the second sequence is empty
}
