// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/attn_received.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_q_heads, num_kv_heads, q_len, kv_len, head_dim;
  bool causal = false;
  int64_t q_start = 0;
  bool max_reduce = false, weighted = false, lse_given = false;
  int64_t lead = 0;          // elements before q and k
  bool interleaved = false;  // heads inside of tokens
  int64_t window = 1 << 30;
  float softcap = 0;
  bool sink = false;
  bool align_ends = false;
  int64_t bias_heads = 0;             // 0: no bias
  int64_t page_size = 0;              // 0: not paged
  std::vector<int32_t> cu_seqlens{};  // of queries and keys alike: packed, batch_size is 1
  bool diagonal = false;              // causal, with align_ends
};

AttnReceivedStrides strides(int64_t heads, int64_t tokens, int64_t dim, bool interleaved) {
  if (interleaved) return {tokens * heads * dim, dim, heads * dim};
  return {heads * tokens * dim, tokens * dim, dim};
}

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.q_len * 7 + c.kv_len + c.head_dim));
  const int64_t rows = c.batch_size * c.num_q_heads * c.q_len;
  const Buffer<T> q(side, random.normals<T>(rows * c.head_dim), c.lead);
  const int64_t max_pages = c.page_size > 0 ? ceil_div(c.kv_len, c.page_size) : 0,
                num_pages = c.batch_size * max_pages + 2;
  const int64_t key_rows = c.page_size > 0 ? num_pages * c.page_size : c.batch_size * c.kv_len;
  const Buffer<T> k(side, random.normals<T>(c.num_kv_heads * key_rows * c.head_dim), c.lead);
  std::vector<int32_t> pages = random.whole<int32_t>(c.batch_size * max_pages, -1, num_pages + 1);  // some are none
  std::vector<int32_t> lens = random.whole<int32_t>(c.batch_size, c.kv_len / 2, c.kv_len + 9);
  const Buffer<int32_t> page_table(side, pages), kv_lens(side, lens), cu_seqlens(side, c.cu_seqlens);
  std::vector<float> lses = random.normals<float>(rows);
  for (size_t i = 0; i < lses.size(); ++i) lses[i] = i % 7 == 3 ? -INFINITY : lses[i] + 4.f;
  const Buffer<float> lse_in(side, lses), q_weight(side, random.normals<float>(rows));
  const Buffer<float> sink(side, random.normals<float>(c.num_q_heads));
  std::vector<float> biases = random.normals<float>(c.batch_size * c.bias_heads * (c.kv_len + 128));
  for (size_t i = 0; i < biases.size(); i += 5) biases[i] = -INFINITY;
  const Buffer<float> key_bias(side, biases);
  const int64_t columns = c.page_size > 0 ? max_pages * c.page_size : c.kv_len;
  const Buffer<float> received(side, c.batch_size * c.num_q_heads * columns), lse(side, rows);
  const Buffer<float> diagonal(side, c.diagonal ? c.batch_size * c.num_q_heads * c.kv_len : 0);
  AttnReceivedArgs a{};
  a.q = q.data();
  a.k = k.data();
  a.lse_in = c.lse_given ? lse_in.data() : nullptr;
  a.q_weight = c.weighted ? q_weight.data() : nullptr;
  a.received = received.data();
  a.lse = lse.data();
  a.stride_q = strides(c.num_q_heads, c.q_len, c.head_dim, c.interleaved);
  a.stride_k = strides(c.num_kv_heads, c.kv_len, c.head_dim, c.interleaved);
  a.stride_lse_in = a.stride_weight = {c.num_q_heads * c.q_len, c.q_len, 1};
  a.batch_size = c.batch_size;
  a.num_q_heads = c.num_q_heads;
  a.num_kv_heads = c.num_kv_heads;
  a.q_len = c.q_len;
  a.kv_len = c.kv_len;
  a.head_dim = c.head_dim;
  a.k_repeat = 1;
  a.q_start = c.q_start;
  a.align_ends = c.align_ends;
  a.back = c.window;
  a.ahead = c.causal ? 0 : c.window;
  if (c.page_size > 0) {
    a.page_table = page_table.data();
    a.kv_lens = kv_lens.data();
    a.num_pages = num_pages;
    a.max_pages = max_pages;
    a.page_shift = __builtin_ctzll(c.page_size);
    a.stride_page = c.page_size * c.num_kv_heads * c.head_dim;
    a.stride_k = {0, c.head_dim, c.num_kv_heads * c.head_dim};
    a.kv_len = max_pages * c.page_size;
  }
  if (!c.cu_seqlens.empty()) {
    a.cu_seqlens = a.cu_seqlens_k = cu_seqlens.data();
    a.batch_size = static_cast<int64_t>(c.cu_seqlens.size()) - 1;
    a.stride_q.batch = a.stride_k.batch = a.stride_lse_in.batch = a.stride_weight.batch = 0;
  }
  a.scale = 1.f / std::sqrt(static_cast<float>(c.head_dim));
  a.softcap = c.softcap;
  a.sink = c.sink ? sink.data() : nullptr;
  if (c.bias_heads > 0) {
    a.key_bias = key_bias.data();
    a.bias_batch = c.bias_heads * c.kv_len;
    a.bias_head = c.bias_heads > 1 ? c.kv_len : 0;
    if (c.bias_heads == c.num_q_heads) {
      a.k_repeat = a.group();
      a.num_kv_heads = c.num_q_heads;
    }
  }
  a.exponent_scale = a.adjusted() ? 1.f : a.scale * kLog2e;
  a.max_reduce = c.max_reduce;
  a.dtype = dtype;
  const int64_t rows_each = a.packed() ? 1 : a.group() * a.q_len;
  const bool split = !a.lse_in && a.kv_len > AttnReceivedArgs::split_keys(rows_each);
  const Buffer<float> partial(side, split ? a.batch_dim() * a.num_kv_heads * a.partial_plane() * 2 : 0);
  a.partial = split ? partial.data() : nullptr;
  TOKRED_RUN(side, attn_received, a);
  // Products of 16-bit values are exact in float32, so one tolerance serves every dtype.
  Results results = Results().add("received", received, 1e-4, 2e-5).add("lse", lse, 2e-5, 2e-5);
  if (!c.diagonal) return results;
  a.diagonal = diagonal.data();
  TOKRED_RUN(side, attn_received_diagonal, a);
  return results.add("diagonal", diagonal, 1e-4, 2e-5);
}

void check_one(const Case& c, DType dtype) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_q_heads, "/", c.num_kv_heads, ", ", c.q_len, "/",
               c.kv_len, ", ", c.head_dim, "]"),
          [&](const Side& side) { return call<T>(c, dtype, side); });
  });
}
void check_all(const Case& c) {
  for (const DType dtype : kDTypes) check_one(c, dtype);
}

}  // namespace

TOKRED_TEST(attn_received, head_dims) {  // every padded head_dim of both types, by 16-byte copies and by single values
  for (const int64_t dim : {40, 64, 72, 80, 96, 128, 160, 192, 256}) {
    check_all({1, 2, 1, 19, 70, dim});
    check_all({1, 2, 1, 19, 70, dim, true, 30, false, true, false, 1});
  }
  check_all({1, 2, 1, 19, 70, 37});
}
TOKRED_TEST(attn_received, options) {
  check_all({2, 4, 2, 7, 45, 24, true, 38, false, false, false, 0, true});
  check_all({2, 4, 2, 7, 45, 24, true, -3, true, true});
  check_all({2, 4, 4, 7, 45, 24, false, 0, true, false, true});
  check_all({2, 4, 1, 7, 45, 24, true, 3, false, true, true});
}
TOKRED_TEST(attn_received, windows) {
  Case c{1, 2, 1, 70, 150, 24};
  for (const int64_t window : {0, 9, 64}) {
    c.window = window;
    c.causal = false;
    c.q_start = 30;
    check_all(c);
    c.causal = true;
    c.q_start = 120;
    check_all(c);
  }
  check_all({1, 2, 1, 3, 2100, 8, true, 1023, false, false, false, 0, false, 5});
}
TOKRED_TEST(attn_received, logits) {  // softcap, sink, key bias
  for (const int64_t bias_heads : {0, 1, 2, 4}) {
    Case c{2, 4, 2, 19, 70, 40};
    c.softcap = bias_heads == 1 ? 0.f : 3.f;
    c.sink = bias_heads != 2;
    c.bias_heads = bias_heads;
    check_all(c);
    c.causal = c.max_reduce = true;
    check_all(c);
  }
  Case c{1, 2, 1, 3, 2100, 8};
  c.sink = true;
  c.bias_heads = 1;
  check_all(c);
}
TOKRED_TEST(attn_received, paged) {  // pages that are none, rows with fewer keys than pages
  for (const int64_t page_size : {1, 16, 128}) {
    Case c{2, 4, 2, 19, 150, 24};
    c.page_size = page_size;
    check_all(c);
    c.causal = c.align_ends = c.sink = true;
    check_all(c);
  }
  Case c{2, 2, 1, 3, 2100, 8};
  c.page_size = 64;
  check_all(c);
}
TOKRED_TEST(attn_received, packed) {  // empty sequences, tokens behind the last one, more sequences than lanes
  Case c{1, 4, 2, 100, 100, 24};
  c.align_ends = true;
  c.cu_seqlens = {0, 5, 5, 70, 93};
  check_all(c);
  c.causal = c.weighted = true;
  check_all(c);
  c.cu_seqlens.clear();
  for (int32_t b = 0; b <= 50; ++b) c.cu_seqlens.push_back(2 * b);
  check_all(c);
  Case split{1, 2, 1, 1200, 1200, 8};
  split.cu_seqlens = {0, 1100, 1200};
  check_one(split, DType::kBF16);
}
TOKRED_TEST(attn_received, blocks) {  // four and eight warps, several blocks of rows and of keys
  check_all({1, 1, 1, 197, 197, 16});
  check_all({1, 2, 1, 150, 300, 16, true, 150});
}
TOKRED_TEST(attn_received, splits) {  // of the keys, and what joins them
  check_all({2, 2, 1, 3, 2100, 8});
  check_all({2, 2, 1, 3, 2100, 8, true, 1030});
}
TOKRED_TEST(attn_received, few_queries) {  // of whole rows, four at a time on the CPU; two panels
  for (const int64_t q_len : {1, 2, 5}) {
    for (const int64_t dim : {24, 72}) {
      Case c{1, 4, 2, q_len, 600, dim, true, 500, false, true, false, 1};
      check_all(c);
      c.interleaved = c.max_reduce = c.sink = true;
      c.softcap = 3.f;
      check_all(c);
      Case paged{2, 2, 2, q_len, 150, dim};
      paged.page_size = 16;
      paged.align_ends = paged.causal = true;
      check_all(paged);
    }
  }
}
TOKRED_TEST(attn_received, whole_panels) {  // of keys that are multiplied without a copy, or at odd addresses
  for (const int64_t lead : {0, 1, 2}) check_all({1, 2, 2, 30, 64, 64, false, 0, false, false, false, lead});
  check_all({1, 2, 2, 30, 64, 64, false, 0, false, false, false, 0, true});
}
TOKRED_TEST(attn_received, empty) {
  check_all({2, 4, 2, 0, 9, 16});
  check_all({2, 4, 2, 5, 0, 16});
  check_all({0, 4, 2, 5, 9, 16});
  check_all({2, 4, 2, 5, 9, 16, true, -100});  // no query sees a key
}
TOKRED_TEST(attn_received, diagonals) {  // every depth; bands, tiles and groups that are not full
  Case c{1, 1, 1, 20, 70, 40, true};
  c.align_ends = c.diagonal = c.weighted = true;
  for (const int64_t dim : {64, 80, 96, 128, 160, 192, 256}) {
    c.head_dim = dim;
    check_all(c);
  }
  c.head_dim = 24;
  c.kv_len = 13;  // fewer keys than queries
  check_all(c);
  c.batch_size = 2;
  c.num_q_heads = 4;
  c.num_kv_heads = 2;
  c.kv_len = 110;
  c.softcap = 3.f;
  c.sink = true;
  c.bias_heads = 4;
  c.window = 80;
  c.lead = 1;
  check_all(c);
  check_one({1, 2, 1, 130, 400, 8, true, 0, false, false, false, 0, false, 1 << 30, 0, false, true, 0, 0, {}, true},
            DType::kBF16);
}
