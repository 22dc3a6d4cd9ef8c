// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/row_similarity.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_tokens, dim;
  bool one_row = false;  // y has a row per batch entry
  int64_t lead = 0;      // elements before x
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens * 7 + c.dim));
  const int64_t rows = c.batch_size * c.num_tokens;
  const Buffer<T> x(side, random.normals<T>(rows * c.dim), c.lead);
  const Buffer<T> y(side, random.normals<T>((c.one_row ? c.batch_size : rows) * c.dim));
  const Buffer<float> cosine(side, rows), dot(side, rows), l2(side, rows), norm_ratio(side, rows);

  RowSimilarityArgs a{};
  a.x = {x.data(), {0, c.num_tokens * c.dim, c.dim}};
  a.y = {y.data(), {0, c.one_row ? c.dim : c.num_tokens * c.dim, c.one_row ? 0 : c.dim}};
  a.size[0] = 1;
  a.size[1] = c.batch_size;
  a.size[2] = c.num_tokens;
  a.dim = c.dim;
  a.cosine = cosine.data();
  a.dot = dot.data();
  a.l2 = l2.data();
  a.norm_ratio = norm_ratio.data();
  a.dtype = dtype;
  TOKRED_RUN(side, row_similarity, a);
  const double terms = static_cast<double>(c.dim);  // a product may cancel
  return Results()
      .add("cosine", cosine, 2e-5, 1e-6)
      .add("dot", dot, 2e-5, 1e-6 * terms)
      .add("l2", l2, 2e-5, 1e-6)
      .add("norm_ratio", norm_ratio, 2e-5, 1e-6);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_tokens, ", ", c.dim, "], one row ", c.one_row,
                 ", lead ", c.lead),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(row_similarity, dims) {  // parts of a warp and all of it; 16-byte loads and single values
  for (const int64_t dim : {1, 8, 15, 31, 40, 64, 72, 128, 200, 264, 1032}) {
    check_all({2, 19, dim});
    check_all({1, 20, dim, false, 1});
  }
}
TOKRED_TEST(row_similarity, one_row_for_all) { check_all({3, 300, 48, true}); }
TOKRED_TEST(row_similarity, empty) {
  check_all({0, 10, 8});
  check_all({2, 3, 0});
}
