// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "attend/attend_selected.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_q_heads, num_kv_heads, q_len, kv_len, num_listed;
  int64_t dim = 40, dim_v = 24;
  int64_t list_heads = 1;
  int64_t bias_heads = 0;
  int64_t page_size = 0;  // 0: dense
  bool lens = false;
  int64_t lead = 0;  // elements before q, k and v
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_listed * 7 + c.kv_len));
  const bool paged = c.page_size > 0;
  const int64_t rows = c.batch_size * c.num_q_heads * c.q_len, num_pages = paged ? 9 : 0;
  const int64_t stored = paged ? num_pages * c.page_size * c.num_kv_heads : c.batch_size * c.num_kv_heads * c.kv_len;
  const Buffer<T> q(side, random.normals<T>(rows * c.dim), c.lead);
  const Buffer<T> k(side, random.normals<T>(stored * c.dim), c.lead);
  const Buffer<T> v(side, random.normals<T>(stored * c.dim_v), c.lead), out(side, rows * c.dim_v);
  // Positions, a tenth of them beyond the end or negative; pages, some of which do not exist.
  const Buffer<int64_t> kept_idx(
      side, random.whole<int64_t>(c.batch_size * c.list_heads * c.num_listed, -1 - c.kv_len / 20, c.kv_len + 2));
  const int64_t max_pages = paged ? c.kv_len / c.page_size : 0;
  const Buffer<int32_t> page_table(side, random.whole<int32_t>(c.batch_size * max_pages, -1, num_pages + 1));
  const Buffer<int32_t> kv_lens(side, random.whole<int32_t>(c.batch_size, 1, c.kv_len + 5));
  const Buffer<float> key_bias(side, random.normals<float>(c.batch_size * c.bias_heads * c.kv_len));
  const Buffer<float> lse(side, rows);

  AttendSelectedArgs a{};
  a.q = q.data();
  const auto storage = [&](const Buffer<T>& from, int64_t dim) {
    return paged ? KvTensor{from.data(), dim, 0, dim, c.page_size * c.num_kv_heads * dim, c.num_kv_heads * dim}
                 : KvTensor{from.data(), dim, c.num_kv_heads * c.kv_len * dim, c.kv_len * dim, 0, dim};
  };
  a.k = storage(k, c.dim);
  a.v = storage(v, c.dim_v);
  a.kept_idx = {kept_idx.data(), true};
  if (paged) a.pages = {page_table.data(), num_pages, max_pages, __builtin_ctzll(static_cast<uint64_t>(c.page_size))};
  a.kv_lens = c.lens ? kv_lens.data() : nullptr;
  a.key_bias = c.bias_heads ? key_bias.data() : nullptr;
  a.out = out.data();
  a.lse = lse.data();
  a.batch_size = c.batch_size;
  a.num_q_heads = c.num_q_heads;
  a.num_kv_heads = c.num_kv_heads;
  a.q_len = c.q_len;
  a.kv_len = c.kv_len;
  a.list_heads = c.list_heads;
  a.bias_heads = c.bias_heads;
  a.num_listed = c.num_listed;
  a.q_batch = c.num_q_heads * c.q_len * c.dim;
  a.q_head = c.q_len * c.dim;
  a.q_token = c.dim;
  a.out_batch = c.num_q_heads * c.q_len * c.dim_v;
  a.out_head = c.q_len * c.dim_v;
  a.out_token = c.dim_v;
  a.bias_batch = c.bias_heads * c.kv_len;
  a.bias_head = c.kv_len;
  a.scale = 1.f / std::sqrt(static_cast<float>(c.dim));
  a.dtype = dtype;
  const int64_t num_splits = choose_policy(a).num_splits;
  const Buffer<float> partial(side, num_splits > 1 ? rows * num_splits * (c.dim_v + 2) : 0);
  a.partial = num_splits > 1 ? partial.data() : nullptr;
  TOKRED_RUN(side, attend_selected, a);
  // The weights of 16-bit values are rounded to that type before the product with V.
  const double tolerance = 2 * rounding(dtype);
  return Results().add("out", out, tolerance, tolerance).add("lse", lse, 2e-5, 2e-5);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(
          text(name_of(dtype), " [", c.batch_size, ", ", c.num_q_heads, "/", c.num_kv_heads, ", ", c.q_len, ", ", c.dim,
               "/", c.dim_v, "] ", c.num_listed, " of ", c.kv_len, ", ", c.list_heads, " lists, page ", c.page_size),
          [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(attend_selected, head_dims) {  // tiles of 64, 128, 256; by 16-byte copies and by single values
  for (const int64_t dim : {16, 40, 64, 72, 128, 160, 256}) {
    check_all({1, 4, 2, 1, 90, 50, dim, dim});
    check_all({1, 4, 2, 1, 90, 50, dim, dim, 1, 0, 0, false, 1});
  }
  check_all({1, 4, 2, 1, 90, 50, 33, 200});
}
TOKRED_TEST(attend_selected, lists) {
  for (const int64_t list_heads : {1, 2, 6}) {
    check_all({2, 6, 2, 1, 70, 33, 24, 24, list_heads});
    check_all({2, 6, 2, 7, 70, 33, 24, 24, list_heads});  // more rows than one tile
  }
}
TOKRED_TEST(attend_selected, bias) {
  for (const int64_t bias_heads : {1, 2, 6}) {
    check_all({2, 6, 2, 1, 70, 33, 24, 24, 2, bias_heads});
    check_all({2, 6, 2, 7, 70, 33, 24, 24, 1, bias_heads});
  }
  check_all({1, 12, 1, 1, 70, 300, 24, 24, 1, 12});  // many rows of bias: shorter splits
}
TOKRED_TEST(attend_selected, pages) {
  for (const int64_t page_size : {1, 16, 32, 64, 128}) {
    check_all({2, 4, 2, 1, 5 * page_size, 40, 24, 24, 2, 0, page_size, true});
  }
}
TOKRED_TEST(attend_selected, splits) {
  check_all({2, 2, 2, 1, 400, 200, 24, 24, 2});
  check_all({1, 2, 1, 1, 3000, 2000, 8, 8, 1, 1, 0, true});
}
TOKRED_TEST(attend_selected, empty) {
  check_all({2, 4, 2, 1, 30, 0});
  check_all({2, 4, 2, 0, 30, 10});
  check_all({0, 4, 2, 1, 30, 10});
  check_all({2, 4, 2, 1, 0, 10});
}
