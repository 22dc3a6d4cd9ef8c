// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/qk_rows.h"
#include "compact/prune_topk.h"

namespace tokred {

enum class HeadReduce : int8_t { kMean, kSum, kMax };

// Token t of a sequence is its key first_key + t.
struct PruneAttnArgs {
  PruneTopkArgs prune;    // its scores, of the rows, are score
  QkRows qk;              // one query per row, heads apart; out is scratch, which one launch does without
  const float* key_bias;  // [batch_size, heads, kv_len] by strides; packed [heads, num_keys]; null: 0
  int64_t bias_batch, bias_head;
  int bias_repeat;    // query heads that share a head of it
  float* score;       // [batch_size, num_tokens] or, packed, [total_tokens]; contiguous
  float* normalizer;  // CUDA, long rows: [batch_size, num_q_heads, 2]
  int64_t first_key;
  HeadReduce reduce;

  // The bias of a head for the keys of its sequence; null: none.
  TOKRED_HOST_DEVICE const float* bias(int64_t batch_idx, int head, const TokenSpan& keys) const {
    return key_bias ? key_bias + batch_idx * bias_batch + head / bias_repeat * bias_head + keys.begin : nullptr;
  }
  // The scores that a row of the batch writes, from its first token on: its tokens', and zeros up to the next sequence.
  TOKRED_HOST_DEVICE int64_t num_scores(int64_t batch_idx, const TokenSpan& tokens) const {
    const TopkRows& rows = prune.rows;
    if (!rows.cu_seqlens) return tokens.len;
    int64_t next = batch_idx + 1 < rows.num_rows ? rows.cu_seqlens[batch_idx + 1] : rows.num_tokens;
    next = next < rows.num_tokens ? next : rows.num_tokens;
    return next - tokens.begin > tokens.len ? next - tokens.begin : tokens.len;
  }
  TOKRED_HOST_DEVICE float* scores_of(int64_t batch_idx, const TokenSpan& tokens) const {
    return score + (prune.rows.cu_seqlens ? 0 : batch_idx * prune.rows.num_tokens) + tokens.begin;
  }
};

constexpr int kPruneAttnThreads = 256;  // of the block that scores, selects and copies
constexpr int kPruneAttnItems = 8;      // tokens that each of them ranks, at most

// How the CUDA path runs a call. Bits do not depend on it.
struct PruneAttnPolicy {
  bool one_launch;  // a block scores, selects and copies; else the logits come from a launch of their own
  bool in_block;    // else: the block that selects makes the scores, too; else a launch each for sums and scores
};

// Words of shared memory, beside what the selection and staged queries take: normalizers, scores, a list; and logits.
constexpr int64_t prune_attn_words(const PruneAttnArgs& a, bool logits) {
  return 2 * a.qk.num_q_heads + a.prune.rows.max_seqlen + a.prune.rows.k +
         (logits ? a.qk.num_q_heads * a.qk.kv_len : 0);
}

constexpr PruneAttnPolicy choose_policy(const PruneAttnArgs& a) {
  const TopkRows& rows = a.prune.rows;
  constexpr int64_t kMaxWords = 60 * 1024 / 4;  // staged queries take up to 36 KiB of the 99 that every GPU has
  const bool in_block = choose_policy(rows.max_seqlen, rows.k).fused && a.qk.kv_len <= 4096 &&
                        prune_attn_words(a, /*logits=*/false) <= kMaxWords;
  // One block reads a row's keys at a fraction of what the GPU does: it pays where rows are enough to fill half of a
  // large one, or so short that a second launch would take longer.
  const int64_t key_bytes = a.qk.num_kv_heads * a.qk.kv_len * a.qk.k.dim * element_size(a.qk.dtype);
  const bool fits =
      rows.max_seqlen <= kPruneAttnThreads * kPruneAttnItems && prune_attn_words(a, /*logits=*/true) <= kMaxWords;
  return {in_block && fits && (rows.num_rows >= 66 || key_bytes <= 256 * 1024), in_block};
}

// Floats of the scratch for logits, and for normalizers.
constexpr int64_t prune_attn_logits(const PruneAttnArgs& a) {
  return a.qk.num_q_heads * (a.qk.cu_seqlens ? a.qk.num_keys : a.qk.batch_size * a.qk.kv_len);
}
constexpr int64_t prune_attn_normalizers(const PruneAttnArgs& a) { return a.qk.batch_size * a.qk.num_q_heads * 2; }

// Blocks per row that select and copy after a launch for the logits. Each of them reads all logits of its row, so it
// copies as many bytes at least.
constexpr int64_t prune_attn_splits(const PruneAttnArgs& a) {
  const TopkRows& rows = a.prune.rows;
  const int64_t row_bytes = a.prune.tensors[0].row_bytes;
  const int64_t logit_bytes = a.qk.num_q_heads * a.qk.kv_len * static_cast<int64_t>(sizeof(float));
  const int64_t most = 1 + rows.k * row_bytes / (logit_bytes + 1);
  const int64_t wanted = prune_topk_splits(rows.num_rows, rows.k, row_bytes);
  return wanted < most ? wanted : most;
}

void prune_attn_cpu(const PruneAttnArgs& args);
int prune_attn_cuda(const PruneAttnArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
