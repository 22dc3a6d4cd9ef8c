// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/kv_tensor.h"
#include "common/ragged.h"

namespace tokred {

struct BlockSummaryArgs {
  const void* k;              // [batch_size, num_heads, kv_len, dim], or packed; last dim contiguous
  const int32_t* kv_lens;     // [batch_size]; null: kv_len each
  const int32_t* cu_seqlens;  // [batch_size + 1]; null: dense
  void* low;                  // [batch_size, num_heads, num_blocks, dim], contiguous: least values, or means
  void* high;                 // likewise: greatest values; null: means
  int64_t batch_size, num_heads, dim;
  int64_t kv_len, max_seqlen;        // of all sequences together and of the longest one when packed
  int64_t block_size, num_blocks;    // per sequence
  int64_t k_batch, k_head, k_token;  // strides in elements
  DType dtype;

  int64_t num_rows() const { return batch_size * num_heads * num_blocks; }
  // Where the tokens of one block are, from the start of the batch entry; len 0 beyond the sequence.
  TOKRED_HOST_DEVICE TokenSpan block(int64_t batch_idx, int64_t block_idx) const {
    TokenSpan span = token_span(cu_seqlens, kv_len, max_seqlen, batch_idx);
    if (!cu_seqlens) span.len = kv_limit(kv_lens, kv_len, batch_idx);
    const int64_t first = block_idx * block_size, left = span.len - first;
    return {span.begin + first, left < 0 ? 0 : left < block_size ? left : block_size};
  }
};

constexpr int kBlockSummaryThreads = 256;

void block_summary_cpu(const BlockSummaryArgs& args);
int block_summary_cuda(const BlockSummaryArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
