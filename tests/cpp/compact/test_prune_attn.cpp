// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/prune_attn.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_q_heads, num_kv_heads, num_tokens, num_keep;  // packed: num_tokens of all rows
  int64_t dim = 16;
  int64_t first_key = 0;
  std::vector<int32_t> cu_seqlens = {};
  int64_t max_seqlen = 0;
  HeadReduce reduce = HeadReduce::kMean;
  bool bias = false;
  int64_t lead = 0;  // elements before q and k
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens * 31 + c.dim));
  const bool packed = !c.cu_seqlens.empty();
  const int64_t total = packed ? c.num_tokens : c.batch_size * c.num_tokens;
  const int64_t kv_len = c.num_tokens + c.first_key, keys = packed ? c.num_tokens : c.batch_size * kv_len;
  // Small whole numbers: the logits are exact on both sides, and the scores tie.
  const Buffer<T> q(side, random.whole<T>(c.batch_size * c.num_q_heads * c.dim, -1, 2), c.lead);
  const Buffer<T> k(side, random.whole<T>(keys * c.num_kv_heads * c.dim, -1, 2), c.lead);
  const Buffer<float> bias(side, random.whole<float>(keys * c.num_q_heads, -2, 3));
  const Buffer<int32_t> cu_seqlens(side, c.cu_seqlens);
  const Buffer<float> x(side, random.normals<float>(total * 5)), kept(side, c.batch_size * c.num_keep * 5);
  const Buffer<int64_t> kept_idx(side, c.batch_size * c.num_keep);
  const Buffer<int32_t> num_kept(side, c.batch_size);
  const Buffer<float> score(side, total);

  PruneAttnArgs a{};
  TopkRows& rows = a.prune.rows;
  rows.score = score.data();
  rows.cu_seqlens = packed ? cu_seqlens.data() : nullptr;
  rows.kept_idx = kept_idx.data();
  rows.num_kept = num_kept.data();
  rows.num_rows = c.batch_size;
  rows.num_heads = 1;
  rows.num_tokens = c.num_tokens;
  rows.max_seqlen = packed ? c.max_seqlen : c.num_tokens;
  rows.k = c.num_keep;
  rows.keep_last = 1;
  rows.score_stride.batch = packed ? 0 : c.num_tokens;
  rows.dtype = DType::kF32;
  a.prune.num_tensors = 1;
  RowTensor& tensor = a.prune.tensors[0];
  tensor.src = reinterpret_cast<const char*>(x.data());
  tensor.dst = reinterpret_cast<char*>(kept.data());
  tensor.row_bytes = tensor.src_token = 5 * sizeof(float);
  tensor.src_batch = packed ? 0 : c.num_tokens * tensor.row_bytes;
  a.qk.q = q.data();
  a.qk.k = {k.data(),
            c.dim,
            packed ? 0 : c.num_kv_heads * kv_len * c.dim,
            packed ? c.dim : kv_len * c.dim,
            0,
            packed ? c.num_kv_heads * c.dim : c.dim};
  a.qk.cu_seqlens = rows.cu_seqlens;
  a.qk.batch_size = c.batch_size;
  a.qk.num_q_heads = c.num_q_heads;
  a.qk.num_kv_heads = c.num_kv_heads;
  a.qk.q_len = 1;
  a.qk.num_keys = kv_len;
  a.qk.kv_len = packed ? c.max_seqlen : kv_len;
  a.qk.q_batch = c.num_q_heads * c.dim;
  a.qk.q_head = c.dim;
  a.qk.scale = 0.25f;
  a.qk.dtype = dtype;
  a.key_bias = c.bias ? bias.data() : nullptr;
  a.bias_batch = packed ? 0 : c.num_q_heads * kv_len;
  a.bias_head = kv_len;
  a.bias_repeat = 1;
  a.score = score.data();
  a.first_key = c.first_key;
  a.reduce = c.reduce;
  const PruneTopkPolicy prune = choose_policy(rows.max_seqlen, rows.k);
  const Buffer<float> logits(side, prune_attn_logits(a)), normalizer(side, prune_attn_normalizers(a));
  const Buffer<uint32_t> workspace(side, topk_workspace_words(prune.select, rows.num_rows));
  a.qk.out = logits.data();
  a.normalizer = normalizer.data();
  rows.workspace = workspace.data();

  TOKRED_RUN(side, prune_attn, a);
  // Ties are as exact as the scores, which differ between the two sides by the order of their sums: the lists are the
  // business of the Python tests, which select again from the scores.
  return Results().add("score", score, 1e-6, 2e-5).add("num_kept", num_kept);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_q_heads, "/", c.num_kv_heads, ", ", c.dim, "] x ",
                 c.num_tokens, " keep ", c.num_keep),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(prune_attn, one_launch) {
  for (const int64_t dim : {16, 40, 72, 128, 160, 256}) check_all({2, 4, 2, 50, 17, dim, 1});
  for (const int64_t n : {1, 33, 513, 2048}) check_all({2, 2, 1, n, (n + 1) / 3});
  check_all({2, 4, 2, 50, 17, 33, 0, {}, 0, HeadReduce::kMax, true, 1});  // by single values
  check_all({1, 70, 1, 20, 7, 16, 0, {}, 0, HeadReduce::kSum});           // more heads than are staged at a time
}
TOKRED_TEST(prune_attn, logits_then_the_rest) {  // too long for one block's keys; keys per thread: 1, 2, 4
  for (const int64_t n : {900, 1025, 2049, 4096}) check_all({1, 16, 16, n, n / 4, 16, 0});
  check_all({1, 16, 16, 2049, 500, 16, 0, {}, 0, HeadReduce::kMax, true});
}
TOKRED_TEST(prune_attn, launch_by_launch) {
  for (const int64_t n : {4097, 9000}) check_all({1, 4, 2, n, 500, 16, 3, {}, 0, HeadReduce::kSum, true});
}
TOKRED_TEST(prune_attn, packed) {
  check_all({4, 4, 2, 500, 60, 16, 0, {0, 20, 20, 400, 500}, 380, HeadReduce::kMean, true});
  check_all({2, 16, 16, 3000, 60, 16, 0, {0, 2900, 3000}, 2900});
  check_all({2, 4, 2, 5000, 60, 16, 0, {0, 4900, 4990}, 4900});  // and tokens of no sequence
}
