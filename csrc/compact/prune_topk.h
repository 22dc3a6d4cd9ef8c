// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/copy_rows.h"
#include "common/dispatch.h"
#include "common/ragged.h"

namespace tokred {

constexpr int kPruneTopkMaxTensors = 16;  // x and companions; their descriptors travel as kernel arguments

struct PruneTopkArgs {
  const void* score;                        // [batch_size, num_tokens] or, packed, [num_tokens]; last dim contiguous
  const uint8_t* keep_mask;                 // as score, contiguous, 0 or 1; null: none is forced
  const uint8_t* drop_mask;                 // as score, contiguous; null: none is excluded
  const int32_t* cu_seqlens;                // [batch_size + 1]; null: dense
  int64_t* kept_idx;                        // [batch_size, k], -1 past num_kept
  int32_t* num_kept;                        // [batch_size]; null: every row keeps k
  RowTensor tensors[kPruneTopkMaxTensors];  // x first; dst [batch_size, k, row]
  int num_tensors;
  int64_t batch_size;
  int64_t num_tokens;  // of a row when dense, of all rows when packed
  int64_t max_seqlen;  // longest row that is looked at; num_tokens when dense
  int64_t k;
  int64_t stride_score;  // between rows, in elements; 0 when packed
  DType score_dtype;
  uint32_t* workspace;  // CUDA, long rows: [2, batch_size, num_chunks * chunk_slots] keys, then tokens
};

// The tokens of one row, as positions in score.
TOKRED_HOST_DEVICE TokenSpan prune_topk_row(const PruneTopkArgs& a, int64_t batch_idx) {
  return token_span(a.cu_seqlens, a.num_tokens, a.max_seqlen, batch_idx);
}

// How the CUDA path runs a call. Pure: a function of sizes alone.
struct PruneTopkPolicy {
  int threads;      // of a selecting block, which holds threads * items keys in registers
  int items;        // 0: the row is read anew in each round
  int num_chunks;   // > 1: blocks first reduce chunks of the row to their own top-k, in a workspace
  int chunk_slots;  // candidates per chunk
  bool fused;       // the selecting blocks also copy: one launch; each repeats the selection, which is short
};
constexpr int kPruneTopkMaxItems = 32, kPruneTopkMaxThreads = 1024, kPruneTopkFusedTokens = 4096;
constexpr int kPruneTopkStreamThreads = 512;  // of a block that reads its row anew: with 1024 it would spill registers
constexpr int kPruneTopkRegisterKeys = kPruneTopkMaxItems * kPruneTopkMaxThreads;

constexpr PruneTopkPolicy choose_policy(int64_t max_seqlen, int64_t k, bool forced, bool packed) {
  PruneTopkPolicy policy{max_seqlen <= 1024 ? 256 : 1024, 0, 1, 0, max_seqlen <= kPruneTopkFusedTokens};
  int64_t keys = max_seqlen;
  if (keys > kPruneTopkRegisterKeys && !forced && !packed) {
    // Candidates must fit one block's registers. A forced set is a property of the whole row, and packed rows differ in
    // length: both read the row anew.
    const int64_t chunks = ceil_div<int64_t>(keys, kPruneTopkRegisterKeys / 4);
    const int64_t slots = k < kPruneTopkRegisterKeys / 4 ? k : kPruneTopkRegisterKeys / 4;
    if (chunks * slots <= kPruneTopkRegisterKeys) {
      policy.num_chunks = static_cast<int>(chunks);
      policy.chunk_slots = static_cast<int>(slots);
      keys = chunks * slots;
    }
  }
  if (keys <= kPruneTopkRegisterKeys) {
    policy.items = 1;
    while (policy.items * policy.threads < keys) policy.items *= 2;
  } else {
    policy.threads = kPruneTopkStreamThreads;
  }
  return policy;
}

// Blocks per row of a fused launch: enough for 16 KiB of output each, as many as fill a large GPU at most.
constexpr int64_t prune_topk_splits(int64_t batch_size, int64_t k, int64_t row_bytes) {
  const int64_t wanted = ceil_div<int64_t>(k * row_bytes, 16384), room = ceil_div<int64_t>(264, batch_size + 1);
  return wanted < 1 ? 1 : wanted < room ? wanted : room;
}

void prune_topk_cpu(const PruneTopkArgs& args);
int prune_topk_cuda(const PruneTopkArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
