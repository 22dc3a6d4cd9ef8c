// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A task has a query head. Read backwards, the sums of diagonals shift by one with each query and lie side by side with
// its keys: adding a row of attention is one loop over both. Queries are added in their order, so that threads change
// no bit.
#include <algorithm>
#include <limits>

#include "common/gemm.h"
#include "common/vector_math.h"
#include "score/attn_received.h"

namespace tokred {
namespace {

constexpr int64_t kTileRows = 64, kPanelKeys = 512;  // 128 KiB of logits

int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

// Logits x on the base-2 scale, capped unless cap is 0, biased unless bias is null: sums += factor * 2^(x - minus).
TOKRED_CLONES void add_row(float* x, int64_t n, float cap, const float* bias, float minus, float factor,
                           float* __restrict sums) {
  if (cap > 0) {
    const float over_cap = 1.f / cap;
    for (int64_t i = 0; i < n; ++i) x[i] = cap * poly_tanh(x[i] * over_cap);
  }
  if (bias) {
    for (int64_t i = 0; i < n; ++i) x[i] += bias[i] * kLog2e;
  }
  for (int64_t i = 0; i < n; ++i) sums[i] += factor * poly_exp2(x[i] - minus);
}

template <typename T>
void sum_head(const AttnReceivedArgs& a, int64_t batch_idx, int64_t head, const AlignedBuffer<float>& q,
              const AlignedBuffer<float>& k, const AlignedBuffer<float>& logits, const AlignedBuffer<float>& sums) {
  const AttnSequence s = a.sequence(batch_idx);
  const int64_t kv_head = head / a.group(), depth = round_up(a.head_dim, 16);
  const int64_t row = batch_idx * a.num_q_heads + head;
  const T* queries = static_cast<const T*>(a.q) + batch_idx * a.stride_q.batch + head * a.stride_q.head;
  const T* keys = static_cast<const T*>(a.k) + batch_idx * a.stride_k.batch + kv_head / a.k_repeat * a.stride_k.head;
  const float* bias = a.key_bias ? a.key_bias + batch_idx * a.bias_batch + kv_head * a.bias_head : nullptr;
  const float* weight =
      a.q_weight ? a.q_weight + batch_idx * a.stride_weight.batch + head * a.stride_weight.head : nullptr;
  std::fill(sums.data(), sums.data() + a.kv_len, 0.f);
  for (int64_t first = 0; first < a.q_len; first += kTileRows) {
    const int64_t num_rows = std::min(kTileRows, a.q_len - first);
    const int64_t rows = round_up(num_rows, 8);
    const int64_t begin = s.visible(static_cast<int>(first)).begin;
    const int64_t end = s.visible(static_cast<int>(first + num_rows - 1)).end;  // of all rows: spans move with queries
    pack_rows(queries + first * a.stride_q.token, a.stride_q.token, num_rows, a.head_dim, rows, depth, a.scale * kLog2e,
              q.data());
    for (int64_t key = begin / kPanelKeys * kPanelKeys; key < end; key += kPanelKeys) {
      const int64_t present = std::min(kPanelKeys, a.kv_len - key), columns = round_up(present, 16);
      pack_rows(keys + key * a.stride_k.token, a.stride_k.token, present, a.head_dim, columns, depth, 1.f, k.data());
      gemm_nt(q.data(), k.data(), logits.data(), rows, columns, depth);
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t query = first + r;
        const float lse = a.lse[row * a.q_len + query];
        const KeySpan seen = s.visible(static_cast<int>(query));
        const int64_t from = std::max<int64_t>(seen.begin, key), to = std::min<int64_t>(seen.end, key + present);
        if (from >= to || lse == -std::numeric_limits<float>::infinity()) continue;
        add_row(logits.data() + r * columns + from - key, to - from, a.softcap * kLog2e, bias ? bias + from : nullptr,
                lse * kLog2e, weight ? weight[query] : 1.f, sums.data() + from - query + a.q_len - 1);
      }
    }
  }
  std::reverse_copy(sums.data(), sums.data() + a.kv_len, a.diagonal + row * a.kv_len);
}

}  // namespace

void attn_received_diagonal_cpu(const AttnReceivedArgs& a) {
  parallel_for_gemm(a.batch_size * a.num_q_heads, [&](int64_t begin, int64_t end) {
    const int64_t depth = round_up(a.head_dim, 16);
    const AlignedBuffer<float> q(kTileRows * depth), k(kPanelKeys * depth), logits(kTileRows * kPanelKeys);
    const AlignedBuffer<float> sums(a.kv_len);
    dispatch_float(a.dtype, [&](auto tag) {
      for (int64_t i = begin; i < end; ++i) {
        sum_head<typename decltype(tag)::type>(a, i / a.num_q_heads, i % a.num_q_heads, q, k, logits, sums);
      }
    });
  });
}

}  // namespace tokred
