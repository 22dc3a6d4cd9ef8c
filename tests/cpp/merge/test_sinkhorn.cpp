// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/sinkhorn.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_rows, num_cols;
  float eps = 0.1f;
  bool given = false, ragged = false;
  int64_t lead = 0;  // elements before cost
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_rows + c.num_cols));
  std::vector<T> costs = random.normals<T>(c.batch_size * c.num_rows * c.num_cols);
  for (T& cost : costs) cost = static_cast<T>(std::fabs(static_cast<float>(cost)));
  const Buffer<T> cost(side, costs, c.lead);
  const Buffer<float> plan(side, c.batch_size * c.num_rows * c.num_cols);
  const Buffer<float> workspace(side, c.batch_size * 2 * (c.num_rows + c.num_cols));
  const Buffer<int32_t> num_rounds(side, c.batch_size);
  const Buffer<float> row_mass(side, std::vector<float>(c.batch_size * c.num_rows, 1.f / c.num_rows));
  const Buffer<float> col_mass(side, std::vector<float>(c.batch_size * c.num_cols, 1.f / c.num_cols));
  const Buffer<int32_t> row_lens(side, random.whole<int32_t>(c.batch_size, -1, c.num_rows + 2));
  const Buffer<int32_t> col_lens(side, random.whole<int32_t>(c.batch_size, -1, c.num_cols + 2));

  SinkhornArgs args{};
  args.cost = cost.data();
  args.row_mass = c.given ? row_mass.data() : nullptr;
  args.col_mass = c.given ? col_mass.data() : nullptr;
  args.row_lens = c.ragged ? row_lens.data() : nullptr;
  args.col_lens = c.ragged ? col_lens.data() : nullptr;
  args.plan = plan.data();
  args.num_rounds = num_rounds.data();
  args.workspace = workspace.data();
  args.batch_size = c.batch_size;
  args.num_rows = c.num_rows;
  args.num_cols = c.num_cols;
  args.stride_batch = c.num_rows * c.num_cols;
  args.stride_row = c.num_cols;
  args.eps = c.eps;
  args.max_rounds = 6;
  args.dtype = dtype;
  TOKRED_RUN(side, sinkhorn, args);
  return Results().add("plan", plan, 1e-3 / c.eps * 0.1, 1e-9).add("num_rounds", num_rounds);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_rows, ", ", c.num_cols, "], eps ", c.eps),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(sinkhorn, sizes) {  // blocks of columns with and without an overlap, groups of rows that are not full
  for (const int64_t num_cols : {1, 15, 16, 17, 33, 128}) check_all({3, 11, num_cols, 0.1f, false, false, 1});
  check_all({1, 40, 130});   // more than one pass over the columns
  check_all({1, 170, 126});  // rows that shared memory does not hold
}
TOKRED_TEST(sinkhorn, absorbs) {
  check_all({2, 20, 24, 0.002f});
  check_all({2, 20, 24, 0.01f, true});
}
TOKRED_TEST(sinkhorn, ragged) {
  check_all({9, 17, 35, 0.1f, false, true});
  check_all({9, 17, 35, 0.1f, true, true});
}
TOKRED_TEST(sinkhorn, empty) {
  check_all({0, 3, 4});
  check_all({2, 0, 4});
  check_all({2, 3, 0});
}
