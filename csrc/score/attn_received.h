// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"

namespace tokred {

constexpr int kAttnReceivedMaxHeadDim = 256;
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

struct AttnReceivedStrides {  // in elements; the last dim is contiguous
  int64_t batch, head, token;
};

struct KeySpan {  // keys [begin, end)
  int begin, end;
  TOKRED_HOST_DEVICE bool has(int key) const { return key >= begin && key < end; }
};

// Which keys a query sees: query i those from i + first up to, not including, i + end, as far as there are such. q_len
// plus kv_len is an int, and so are all sums here: first and end lie in [-q_len, kv_len].
struct Band {
  int first, end;
};
// The query at position p sees the keys from p - back to p + ahead; q_start is the position of query 0. All three are
// within 2^60 of zero.
TOKRED_HOST_DEVICE Band make_band(int64_t q_start, int64_t back, int64_t ahead, int64_t q_len, int64_t kv_len) {
  const int64_t first = q_start - back, end = q_start + ahead + 1;
  return {static_cast<int>(first < -q_len   ? -q_len
                           : first < kv_len ? first
                                            : kv_len),
          static_cast<int>(end < -q_len   ? -q_len
                           : end < kv_len ? end
                                          : kv_len)};
}

// Rows are the queries of all heads of a group, head after head: these group() * q_len rows share one key head's K and
// bias. Where each query head has a bias of its own, it is a group of its own, and k_repeat groups share a head of k.
struct AttnReceivedArgs {
  const void* q;          // [batch_size, num_q_heads, q_len, head_dim]
  const void* k;          // [batch_size, num_kv_heads / k_repeat, kv_len, head_dim]
  const float* lse_in;    // [batch_size, num_q_heads, q_len], last dim contiguous; null: computed
  const float* q_weight;  // as lse_in; null: 1
  const float* sink;      // [num_q_heads], contiguous; null: none. Never with lse_in
  const float* key_bias;  // [batch_size, num_kv_heads, kv_len] by strides, last dim contiguous; null: 0
  float* received;        // [batch_size, num_q_heads, kv_len], contiguous
  float* lse;             // [batch_size, num_q_heads, q_len], contiguous
  float* partial;         // CUDA only: [batch_size * num_kv_heads, num_splits, rows, 2]; null when num_splits is 1
  AttnReceivedStrides stride_q, stride_k, stride_lse_in, stride_weight;
  int64_t bias_batch, bias_head;  // strides of key_bias
  int64_t batch_size, num_q_heads, num_kv_heads, q_len, kv_len, head_dim;
  int64_t k_repeat;
  Band band;
  float scale;
  float exponent_scale;  // CUDA: of a logit before 2^x, log2(e) * scale; 1 where adjusted() has brought it to that
  float softcap;         // logits are softcap * tanh(logit / softcap); 0: as they are
  bool max_reduce;
  DType dtype;  // of q and k

  TOKRED_HOST_DEVICE int64_t group() const { return num_kv_heads > 0 ? num_q_heads / num_kv_heads : 0; }
  TOKRED_HOST_DEVICE int64_t rows() const { return group() * q_len; }
  // Whether a logit is more than a product times scale.
  TOKRED_HOST_DEVICE bool adjusted() const { return key_bias || softcap > 0; }
  TOKRED_HOST_DEVICE KeySpan visible(int q_idx) const {
    const int first = q_idx + band.first, end = q_idx + band.end, last = static_cast<int>(kv_len);
    return {first < 0 ? 0 : first < last ? first : last, end < 0 ? 0 : end < last ? end : last};
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
  // The warp's own rows stay in registers over the whole depth: 32 rows of 16-bit values up to 128 deep take 64
  // registers.
  policy.rows_per_warp = dtype == DType::kF32 || head_dim > 128 ? 16 : 32;
  const int max_warps = dtype == DType::kF32 ? 4 : 8;
  policy.warps_lse = attn_received_warps(rows, policy.rows_per_warp, max_warps);
  policy.warps_received = attn_received_warps(kv_len, policy.rows_per_warp, max_warps);
  // 1,024 keys per block for few rows: a window of 64 queries over 131,072 keys makes 128 blocks per key head. More
  // rows bring blocks of their own; splits grow with them, which holds the partials to rows + kv_len / 4 pairs.
  policy.split_keys = std::min<int64_t>(1024 * ceil_div<int64_t>(rows > 0 ? rows : 1, 256), 1 << 30);
  policy.num_splits = kv_len > policy.split_keys ? ceil_div<int64_t>(kv_len, policy.split_keys) : 1;
  return policy;
}

void attn_received_cpu(const AttnReceivedArgs& args);
int attn_received_cuda(const AttnReceivedArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
