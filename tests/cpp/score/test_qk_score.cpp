// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/qk_score.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_q_heads, num_kv_heads, q_len, kv_len;
  int64_t dim = 40;
  bool sum_heads = false;
  bool weight = false;
  int64_t channel_heads = 0;  // 0: all channels
  int64_t page_size = 0;      // 0: dense
  bool lens = false;
  int64_t lead = 0;  // elements before q and k
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.kv_len * 7 + c.dim));
  const bool paged = c.page_size > 0;
  const int64_t num_pages = paged ? 9 : 0, max_pages = paged ? c.kv_len / c.page_size : 0, num_channels = 11;
  const int64_t rows = c.batch_size * c.q_len, stored = paged ? num_pages * c.page_size : c.batch_size * c.kv_len;
  const Buffer<T> q(side, random.normals<T>(rows * c.num_q_heads * c.dim), c.lead);
  const Buffer<T> k(side, random.normals<T>(stored * c.num_kv_heads * c.dim), c.lead);
  // Some pages and channels do not exist.
  const Buffer<int32_t> page_table(side, random.whole<int32_t>(c.batch_size * max_pages, -1, num_pages + 1));
  const Buffer<int32_t> kv_lens(side, random.whole<int32_t>(c.batch_size, -1, c.kv_len + 5));
  const Buffer<int32_t> channels(side, random.whole<int32_t>(c.channel_heads * num_channels, -1, c.dim + 1));
  const Buffer<float> head_weight(side, random.normals<float>(rows * c.num_q_heads));
  const Buffer<float> out(side, rows * (c.sum_heads ? 1 : c.num_q_heads) * c.kv_len);

  QkRows a{};
  a.q = q.data();
  a.k = paged ? KvTensor{k.data(), c.dim, 0, c.dim, c.page_size * c.num_kv_heads * c.dim, c.num_kv_heads * c.dim}
              : KvTensor{k.data(), c.dim, c.num_kv_heads * c.kv_len * c.dim, c.kv_len * c.dim, 0, c.dim};
  if (paged) a.pages = {page_table.data(), num_pages, max_pages, __builtin_ctzll(static_cast<uint64_t>(c.page_size))};
  a.kv_lens = c.lens ? kv_lens.data() : nullptr;
  a.head_weight = c.weight ? head_weight.data() : nullptr;
  a.channels = {channels.data(), false};
  a.out = out.data();
  a.batch_size = c.batch_size;
  a.num_q_heads = c.num_q_heads;
  a.num_kv_heads = c.num_kv_heads;
  a.q_len = c.q_len;
  a.kv_len = c.kv_len;
  a.channel_heads = c.channel_heads;
  a.num_channels = num_channels;
  a.q_batch = c.num_q_heads * c.q_len * c.dim;
  a.q_head = c.q_len * c.dim;
  a.q_token = c.dim;
  a.use_channels = c.channel_heads > 0;
  a.relu = c.weight;
  a.sum_heads = c.sum_heads;
  a.scale = 0.3f;
  a.dtype = dtype;
  TOKRED_RUN(side, qk_score, a);
  return Results().add("out", out, 2e-5, 1e-4);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_q_heads, "/", c.num_kv_heads, ", ", c.q_len, ", ",
                 c.dim, "] x ", c.kv_len, ", page ", c.page_size, ", sum ", c.sum_heads),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(qk_score, head_dims) {  // tiles of 64, 128, 256; by 16-byte loads and by single values
  for (const int64_t dim : {16, 40, 64, 72, 128, 160, 256}) {
    check_all({1, 4, 2, 1, 90, dim});
    check_all({1, 4, 2, 1, 90, dim, true, true, 0, 0, false, 1});
  }
  check_all({1, 1, 1, 1, 33, 33});
}
TOKRED_TEST(qk_score, rows) {  // one tile, several, more than a block holds
  for (const int64_t heads : {2, 10, 36, 80}) {
    for (const bool sum_heads : {false, true}) {
      check_all({2, heads, 2, 1, 70, 24, sum_heads, sum_heads});
      check_all({1, heads, 2, 3, 70, 24, sum_heads});
    }
  }
  check_all({1, 40, 1, 1, 30, 256});  // 32 rows at a time with float32
  check_all({1, 40, 1, 1, 30, 256, true});
}
TOKRED_TEST(qk_score, channels) {
  check_all({2, 6, 2, 1, 70, 24, false, false, 1});
  check_all({2, 6, 2, 2, 70, 24, true, true, 2});
}
TOKRED_TEST(qk_score, pages) {
  for (const int64_t page_size : {1, 16, 32, 64, 128}) {
    check_all({2, 4, 2, 1, 5 * page_size, 24, false, false, 0, page_size, true});
    check_all({2, 4, 2, 1, 5 * page_size, 24, true, false, 0, page_size, true});
  }
}
TOKRED_TEST(qk_score, long_rows) {  // several tasks of a thread; large blocks
  check_all({1, 2, 2, 1, 1500, 24, false, false, 0, 0, true});
  check_all({1, 2, 2, 1, 1500, 24, true, false, 0, 0, true});
  check_all({1, 1, 1, 1, 70000, 8});
}
TOKRED_TEST(qk_score, empty) {
  check_all({0, 4, 2, 1, 30});
  check_all({2, 4, 2, 0, 30});
  check_all({2, 4, 2, 1, 0});
}
