// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/pair_reduce.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_x, num_y, dim;
  PairFunction function = PairFunction::kSum;
  bool rules = false;   // drop_mask, groups, exclude_self
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
  const int64_t total_y = c.packed ? ends_y.back() : c.batch_size * c.num_y;
  const Buffer<T> x(side, random.whole<T>(total_x * c.dim, -2, 3), c.lead);
  const Buffer<T> y(side, random.whole<T>(total_y * c.dim, -2, 3));
  const Buffer<uint8_t> drop_mask(side, random.whole<uint8_t>(total_y, 0, 2));
  const Buffer<int64_t> x_group(side, random.whole<int64_t>(total_x, 0, 3));
  const Buffer<int64_t> y_group(side, random.whole<int64_t>(total_y, 0, 3));
  const Buffer<int32_t> cu_x(side, ends_x), cu_y(side, ends_y);
  const Buffer<float> out(side, total_x);
  PairReduceArgs args{};
  PairInputs& in = args.in;
  in.x = x.data();
  in.y = y.data();
  in.batch_size = c.batch_size;
  in.num_x = c.packed ? total_x : c.num_x;
  in.num_y = c.packed ? total_y : c.num_y;
  in.dim = in.stride_x = in.stride_y = c.dim;
  in.stride_x_batch = c.packed ? 0 : c.num_x * c.dim;
  in.stride_y_batch = c.packed ? 0 : c.num_y * c.dim;
  in.stride_y_list = c.packed ? 0 : c.num_y;
  if (c.packed) {
    in.cu_x = cu_x.data();
    in.cu_y = cu_y.data();
  }
  if (c.rules) {
    in.drop_mask = drop_mask.data();
    in.x_group = {x_group.data(), true};
    in.y_group = {y_group.data(), true};
    in.exclude_self = true;
  }
  in.metric = PairMetric::kDot;
  in.dtype = dtype;
  args.out = out.data();
  args.param = 4.f;
  args.function = c.function;
  const Buffer<double> partial(side, pair_reduce_partial_size(args));
  args.partial = partial.data();
  TOKRED_RUN(side, pair_reduce, args);
  const bool exact = c.function == PairFunction::kSum || c.function == PairFunction::kCountAbove;
  return Results().add("out", out, exact ? 0 : 1e-4, exact ? 0 : 1e-4);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_x, " x ", c.num_y, ", ", c.dim, "] function ",
                 static_cast<int>(c.function)),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

constexpr PairFunction kFunctions[] = {PairFunction::kMean,        PairFunction::kSum,       PairFunction::kCountAbove,
                                       PairFunction::kSoftmaxMean, PairFunction::kEluMargin, PairFunction::kGauss};

}  // namespace

TOKRED_TEST(pair_reduce, functions) {
  for (const PairFunction function : kFunctions) {
    check_all({2, 20, 45, 8, function});
    check_all({2, 5, 300, 8, function, true});  // several tiles
    check_all({3, 20, 45, 8, function, true, true});
  }
}
TOKRED_TEST(pair_reduce, dims) {  // wide and narrow loads, one step of the depth and several
  for (const int64_t dim : {1, 7, 64, 136}) check_all({1, 70, 30, dim});
  check_all({1, 70, 30, 64, PairFunction::kSum, false, false, 1});
}
TOKRED_TEST(pair_reduce, shares) { check_all({1, 3, 4200, 2}); }  // of y
TOKRED_TEST(pair_reduce, empty) {
  check_all({0, 20, 30, 8});
  check_all({2, 0, 30, 8});
  check_all({2, 20, 0, 8});
  check_all({2, 20, 30, 0});
  check_all({2, 1, 1, 8, PairFunction::kSoftmaxMean, false, true});  // the second sequence is empty
}
