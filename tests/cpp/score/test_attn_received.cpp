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
  int64_t bias_heads = 0;  // 0: no bias
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
  const Buffer<T> k(side, random.normals<T>(c.batch_size * c.num_kv_heads * c.kv_len * c.head_dim), c.lead);
  std::vector<float> lses = random.normals<float>(rows);
  for (size_t i = 0; i < lses.size(); ++i) lses[i] = i % 7 == 3 ? -INFINITY : lses[i] + 4.f;
  const Buffer<float> lse_in(side, lses), q_weight(side, random.normals<float>(rows));
  const Buffer<float> sink(side, random.normals<float>(c.num_q_heads));
  std::vector<float> biases = random.normals<float>(c.batch_size * c.bias_heads * c.kv_len);
  for (size_t i = 0; i < biases.size(); i += 5) biases[i] = -INFINITY;
  const Buffer<float> key_bias(side, biases);
  const Buffer<float> received(side, c.batch_size * c.num_q_heads * c.kv_len), lse(side, rows);
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
  a.band = make_band(c.q_start, c.window, c.causal ? 0 : c.window, c.q_len, c.kv_len);
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
  const auto policy = choose_attn_received_policy(a.rows(), a.kv_len, a.head_dim, dtype);
  const bool split = !a.lse_in && policy.num_splits > 1;
  const Buffer<float> partial(side, split ? c.batch_size * a.num_kv_heads * policy.num_splits * a.rows() * 2 : 0);
  a.partial = split ? partial.data() : nullptr;
  TOKRED_RUN(side, attn_received, a);
  // Products of 16-bit values are exact in float32, so one tolerance serves every dtype.
  return Results().add("received", received, 1e-4, 2e-5).add("lse", lse, 2e-5, 2e-5);
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
TOKRED_TEST(attn_received, blocks) {  // four and eight warps, several blocks of rows and of keys
  check_all({1, 1, 1, 197, 197, 16});
  check_all({1, 2, 1, 150, 300, 16, true, 150});
}
TOKRED_TEST(attn_received, splits) {  // of the keys, and what joins them
  check_all({2, 2, 1, 3, 2100, 8});
  check_all({2, 2, 1, 3, 2100, 8, true, 1030});
}
TOKRED_TEST(attn_received, empty) {
  check_all({2, 4, 2, 0, 9, 16});
  check_all({2, 4, 2, 5, 0, 16});
  check_all({0, 4, 2, 5, 9, 16});
  check_all({2, 4, 2, 5, 9, 16, true, -100});  // no query sees a key
}
