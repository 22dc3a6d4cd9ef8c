// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/copy_rows.h"
#include "common/dispatch.h"

namespace tokred {

constexpr int kPruneTopkMaxTensors = 16;  // x and companions; their descriptors travel as kernel arguments

struct PruneTopkArgs {
  const void* score;            // [batch_size, num_tokens] or, packed, [num_tokens]; last dim contiguous
  const uint8_t* keep_mask;     // as score, contiguous, 0 or 1; null: none is forced
  const uint8_t* drop_mask;     // as score, contiguous; null: none is excluded
  const int32_t* cu_seqlens;    // [batch_size + 1]; null: dense
  int64_t* kept_idx;            // [batch_size, k], -1 past num_kept
  int32_t* num_kept;            // [batch_size]; null: every row keeps k
  RowTensor tensors[kPruneTopkMaxTensors];  // x first; dst [batch_size, k, row]
  int num_tensors;
  int64_t batch_size;
  int64_t num_tokens;           // of a row when dense, of all rows when packed
  int64_t max_seqlen;           // longest row that is looked at; num_tokens when dense
  int64_t k;
  int64_t stride_score;         // between rows, in elements; 0 when packed
  DType score_dtype;
};

// The tokens of one row: [begin, begin + len) of the score, clipped so that a bad cu_seqlens reads nothing out of bounds.
struct PruneTopkRow {
  int64_t begin, len;
};
TOKRED_HOST_DEVICE PruneTopkRow prune_topk_row(const PruneTopkArgs& a, int64_t batch_idx) {
  if (!a.cu_seqlens) return {0, a.num_tokens};
  int64_t begin = a.cu_seqlens[batch_idx], end = a.cu_seqlens[batch_idx + 1];
  begin = begin < 0 ? 0 : begin;
  end = end > a.num_tokens ? a.num_tokens : end;
  if (end > begin + a.max_seqlen) end = begin + a.max_seqlen;
  return {begin, end > begin ? end - begin : 0};
}

void prune_topk_cpu(const PruneTopkArgs& args);
int prune_topk_cuda(const PruneTopkArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
