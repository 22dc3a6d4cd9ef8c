// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"

namespace tokred {

constexpr int kAttnReceivedMaxHeadDim = 256;

struct AttnReceivedStrides {  // in elements; the last dim is contiguous
  int64_t batch, head, token;
};

// Rows are the queries of all heads of a group, head after head: these group() * q_len rows share one key head's K.
struct AttnReceivedArgs {
  const void* q;          // [batch_size, num_q_heads, q_len, head_dim]
  const void* k;          // [batch_size, num_kv_heads, kv_len, head_dim]
  const float* lse_in;    // [batch_size, num_q_heads, q_len], last dim contiguous; null: computed
  const float* q_weight;  // as lse_in; null: 1
  float* received;        // [batch_size, num_q_heads, kv_len], contiguous
  float* lse;             // [batch_size, num_q_heads, q_len], contiguous
  float* partial;         // CUDA only: [batch_size * num_kv_heads, num_splits, rows, 2]; null when num_splits is 1
  AttnReceivedStrides stride_q, stride_k, stride_lse_in, stride_weight;
  int64_t batch_size, num_q_heads, num_kv_heads, q_len, kv_len, head_dim;
  int64_t q_start;  // the position of query 0; may be negative
  float scale;
  bool causal, max_reduce;
  DType dtype;  // of q and k

  TOKRED_HOST_DEVICE int64_t group() const { return num_kv_heads > 0 ? num_q_heads / num_kv_heads : 0; }
  TOKRED_HOST_DEVICE int64_t rows() const { return group() * q_len; }
  // How many keys query q_idx sees, from the first.
  TOKRED_HOST_DEVICE int64_t num_visible(int64_t q_idx) const {
    if (!causal) return kv_len;
    const int64_t end = q_start + q_idx + 1;
    return end < 0 ? 0 : end < kv_len ? end : kv_len;
  }
};

// All that may be tuned on CUDA. It follows from the shapes of one batch row, so bits do not depend on the batch.
struct AttnReceivedPolicy {
  int rows_per_warp;               // queries in pass 1, keys in pass 2
  int warps_lse, warps_received;   // per block
  int64_t split_keys, num_splits;  // pass 1: keys per block
};

// 8 warps share a streamed tile twice as often as 4; 4 leave less of the last block idle.
constexpr int attn_received_warps(int64_t rows, int rows_per_warp, int max_warps) {
  const int64_t units = ceil_div<int64_t>(rows, rows_per_warp);
  const bool wide = ceil_div<int64_t>(units, 8) * 8 * 7 <= ceil_div<int64_t>(units, 4) * 4 * 8;
  return max_warps >= 8 && wide ? 8 : 4;
}

constexpr AttnReceivedPolicy choose_attn_received_policy(int64_t rows, int64_t kv_len, int64_t head_dim, DType dtype) {
  AttnReceivedPolicy policy{};
  // The warp's own rows stay in registers over the whole depth: 32 rows of 16-bit values up to 128 deep take 64 registers.
  policy.rows_per_warp = dtype == DType::kF32 || head_dim > 128 ? 16 : 32;
  const int max_warps = dtype == DType::kF32 ? 4 : 8;
  policy.warps_lse = attn_received_warps(rows, policy.rows_per_warp, max_warps);
  policy.warps_received = attn_received_warps(kv_len, policy.rows_per_warp, max_warps);
  // 1,024 keys per block for few rows: a window of 64 queries over 131,072 keys makes 128 blocks per key head. More rows
  // bring blocks of their own; splits grow with them, which holds the partials to O(keys) floats.
  const int64_t row_blocks = ceil_div<int64_t>(rows, policy.warps_lse * policy.rows_per_warp);
  policy.split_keys = 1024 * (row_blocks > 1 ? row_blocks : 1);
  policy.num_splits = kv_len > policy.split_keys ? ceil_div<int64_t>(kv_len, policy.split_keys) : 1;
  return policy;
}

void attn_received_cpu(const AttnReceivedArgs& args);
int attn_received_cuda(const AttnReceivedArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
