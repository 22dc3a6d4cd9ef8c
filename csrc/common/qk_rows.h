// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Logits of a few queries against many rows of K: what qk_score and prune_attn share, as plain data.
#pragma once
#include "common/kv_tensor.h"
#include "common/ragged.h"

namespace tokred {

constexpr int64_t kQkRowsMaxQueries = 16;
constexpr int64_t kQkRowsMaxHeadDim = 256;

struct QkRows {
  const void* q;  // [batch_size, num_q_heads, q_len, k.dim], last dim contiguous
  KvTensor k;
  KvPages pages;
  const int32_t*
      cu_seqlens;  // [batch_size + 1], dense k alone: its token dimension holds all sequences; null: it does not
  const int32_t* kv_lens;    // [batch_size]; null: kv_len each
  const float* head_weight;  // [batch_size, q_len, num_q_heads], contiguous; null: 1
  IndexPtr channels;         // [channel_heads, num_channels], contiguous; only with use_channels
  float* out;  // [batch_size, num_q_heads, q_len, kv_len], or without heads where they are summed; packed, with one
               // query and heads apart: [num_q_heads, num_keys]
  int64_t batch_size, num_q_heads, num_kv_heads, q_len;
  int64_t kv_len;                       // max_pages * page_size when paged, an upper bound when packed
  int64_t num_keys;                     // of all sequences; packed alone
  int64_t channel_heads, num_channels;  // num_kv_heads or 1
  int64_t q_batch, q_head, q_token;     // strides in elements
  bool use_channels, relu, sum_heads;
  float scale;
  DType dtype;  // of q and k

  TOKRED_HOST_DEVICE int64_t group() const { return num_kv_heads > 0 ? num_q_heads / num_kv_heads : 0; }
  // The keys of a batch entry: begin counts along the token dimension of k.
  TOKRED_HOST_DEVICE TokenSpan keys(int64_t batch_idx) const {
    if (cu_seqlens) return token_span(cu_seqlens, num_keys, kv_len, batch_idx);
    return {0, kv_limit(kv_lens, kv_len, batch_idx)};
  }
  // How many logits a row has: of keys that do not exist, too, unless packed.
  TOKRED_HOST_DEVICE int64_t num_logits(const TokenSpan& keys) const { return cu_seqlens ? keys.len : kv_len; }
  // Where the logits of a head's first query start; those of the next query, then head, follow.
  TOKRED_HOST_DEVICE int64_t logits_at(int64_t batch_idx, int64_t head, const TokenSpan& keys) const {
    return cu_seqlens ? head * num_keys + keys.begin : (batch_idx * num_q_heads + head) * q_len * kv_len;
  }
  TOKRED_HOST_DEVICE int64_t logits_stride() const { return cu_seqlens ? num_keys : kv_len; }
  TOKRED_HOST_DEVICE float weight(int64_t batch_idx, int64_t token, int64_t q_head_idx) const {
    return head_weight ? head_weight[(batch_idx * q_len + token) * num_q_heads + q_head_idx] : 1.f;
  }
  TOKRED_HOST_DEVICE float activate(float logit) const { return relu && logit < 0.f ? 0.f : logit; }  // NaN stays
};

// What the CUDA path may tune. Each score is computed alone, so none of it changes a bit.
struct QkRowsPolicy {
  int tile_dim;            // head_dim is padded to this in registers
  int64_t rows;            // rows of queries that share a key head, with the padding of heads that are summed
  int64_t rows_per_block;  // of these, in shared memory at a time
  int64_t chunks;          // of that many rows
  int64_t keys_per_block, key_blocks;
};

constexpr int kQkRowsThreads = 128;
constexpr int kQkTileRows = 16;

constexpr QkRowsPolicy choose_qk_policy(const QkRows& a) {
  QkRowsPolicy p{};
  p.tile_dim = a.k.dim <= 64 ? 64 : a.k.dim <= 128 ? 128 : 256;
  const int64_t group = a.num_q_heads / a.num_kv_heads;
  // Summed heads fill tiles of their own for each query, so that the sum stays within a tile's columns.
  p.rows = a.sum_heads ? a.q_len * ceil_div<int64_t>(group, kQkTileRows) * kQkTileRows : group * a.q_len;
  p.rows_per_block = p.tile_dim * element_size(a.dtype) > 512 ? 32 : 64;
  p.chunks = ceil_div(p.rows, p.rows_per_block);
  // 256 keys are worth the loading of the queries; fewer where that leaves SMs without two blocks, and where a block
  // walks all heads anyhow.
  const int64_t blocks = a.batch_size * a.num_kv_heads * p.chunks * ceil_div<int64_t>(a.kv_len, 256);
  p.keys_per_block = a.sum_heads || blocks < 264 ? 64 : 256;
  p.key_blocks = ceil_div(a.kv_len, p.keys_per_block);
  return p;
}

constexpr int64_t num_blocks(const QkRows& a, const QkRowsPolicy& p) {
  return a.batch_size * p.key_blocks * (a.sum_heads ? 1 : a.num_kv_heads * p.chunks);
}

void qk_rows_cpu(const QkRows& args);
int qk_rows_cuda(const QkRows& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
