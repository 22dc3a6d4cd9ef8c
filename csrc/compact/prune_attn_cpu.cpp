// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Logits of all heads (common/qk_rows.cpp), exponentials head by head where they lie, scores token by token over the
// heads in their order, then what prune_topk does. Every piece of work has its own results, so threads change no bit.
#include "compact/prune_attn.h"

#include <limits>

#include "common/constants.h"
#include "common/vector_math.h"

namespace tokred {
namespace {

constexpr int64_t kScoreTile = 1024;  // tokens of a task, whose sums stay in the first-level cache
constexpr float kInf = std::numeric_limits<float>::infinity();

// Logits x, plus bias unless that is null, become e^(x - highest). Returns what makes attention of them: 1 over their
// sum, or 0 where no key is seen. A NaN or +inf among them makes all NaN.
TOKRED_CLONES float exponentiate(float* x, const float* bias, int64_t n) {
  if (bias) {
    for (int64_t i = 0; i < n; ++i) x[i] += bias[i];
  }
  float lanes[kLanes];
  const int64_t whole = n / kLanes * kLanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = -kInf;
  for (int64_t at = 0; at < whole; at += kLanes) {  // a NaN is ignored here and met again in the sum
    for (int i = 0; i < kLanes; ++i) lanes[i] = x[at + i] > lanes[i] ? x[at + i] : lanes[i];
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] = x[i] > lanes[i - whole] ? x[i] : lanes[i - whole];
  const float highest = max_lanes(lanes);
  if (highest == -kInf) {  // of nothing but -inf and NaN
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] == -kInf ? 0.f : x[i];
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = poly_exp2((x[i] - highest) * kLog2e);
  }
  for (int i = 0; i < kLanes; ++i) lanes[i] = 0.f;
  for (int64_t at = 0; at < whole; at += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += x[at + i];
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += x[i];
  const float sum = sum_lanes(lanes);
  return sum == 0.f ? 0.f : 1.f / sum;
}

TOKRED_CLONES void add_head(const float* exponential, float factor, int64_t n, bool max, float* score) {
  if (max) {
    for (int64_t i = 0; i < n; ++i) {
      const float p = exponential[i] * factor;
      score[i] = p > score[i] || p != p ? p : score[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) score[i] += exponential[i] * factor;
  }
}
TOKRED_CLONES void multiply(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// Scores [begin, end) of a row of the batch.
void score_tokens(const PruneAttnArgs& a, const float* factor, int64_t batch_idx, int64_t begin, int64_t end) {
  const TokenSpan keys = a.qk.keys(batch_idx), tokens = topk_span(a.prune.rows, batch_idx);
  end = std::min(end, a.num_scores(batch_idx, tokens));
  if (begin >= end) return;
  float* score = a.scores_of(batch_idx, tokens) + begin;
  std::fill(score, score + (end - begin), 0.f);
  const int64_t n = std::min({end, tokens.len, keys.len - a.first_key}) - begin;
  for (int64_t head = 0; head < a.qk.num_q_heads; ++head) {
    const float* exponential = a.qk.out + a.qk.logits_at(batch_idx, head, keys) + a.first_key + begin;
    add_head(exponential, factor[batch_idx * a.qk.num_q_heads + head], n, a.reduce == HeadReduce::kMax, score);
  }
  if (a.reduce == HeadReduce::kMean) multiply(score, 1.f / static_cast<float>(a.qk.num_q_heads), n);
}

}  // namespace

void prune_attn_cpu(const PruneAttnArgs& a) {
  qk_rows_cpu(a.qk);
  const int64_t num_rows = a.prune.rows.num_rows, num_heads = a.qk.num_q_heads;
  const AlignedBuffer<float> factor(num_rows * num_heads);
  parallel_for(num_rows * num_heads, 1 + 16384 / (a.qk.kv_len + 64), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch_idx = i / num_heads;
      const int head = static_cast<int>(i % num_heads);
      const TokenSpan keys = a.qk.keys(batch_idx);
      factor[i] =
          exponentiate(a.qk.out + a.qk.logits_at(batch_idx, head, keys), a.bias(batch_idx, head, keys), keys.len);
    }
  });
  // The last tile of a row goes on to where the next row starts.
  const int64_t tiles = std::max<int64_t>(1, ceil_div(a.prune.rows.max_seqlen, kScoreTile));
  const int64_t grain = 1 + 32768 / (std::min(kScoreTile, a.prune.rows.max_seqlen) * num_heads + 1);
  parallel_for(num_rows * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i % tiles, first = tile * kScoreTile;
      const bool last = tile == tiles - 1;
      score_tokens(a, factor.data(), i / tiles, first, last ? std::numeric_limits<int64_t>::max() : first + kScoreTile);
    }
  });
  prune_topk_cpu(a.prune);
}

}  // namespace tokred
