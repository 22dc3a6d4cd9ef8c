// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Top-k of many rows of scores: what prune_topk and select_topk share, as plain data.
#pragma once
#include "common/dispatch.h"
#include "common/ragged.h"

namespace tokred {

struct Plan;

// One row of a selection. A token is forced by keep or by its place, excluded by drop, which wins.
template <typename T>
struct TopkRow {
  const T* score;
  int64_t stride;       // of score, in elements
  const uint8_t* keep;  // [num_tokens], 0 or 1; null: none is forced
  const uint8_t* drop;  // [num_tokens]; null: none is excluded
  int32_t num_tokens;
  int32_t keep_before = 0;        // tokens before this one are forced
  int32_t keep_from = INT32_MAX;  // so are those from this one on

  TOKRED_HOST_DEVICE bool forced(int32_t token) const {
    return token < keep_before || token >= keep_from || (keep && keep[token]);
  }
  // How many tokens are forced by their place.
  TOKRED_HOST_DEVICE int32_t num_window() const {
    const int32_t from = keep_from < num_tokens ? keep_from : num_tokens;
    return from > keep_before ? num_tokens - (from - keep_before) : num_tokens;
  }
};

struct RowStrides {
  int64_t batch, head;  // in elements; batch is 0 when packed
};

// The rows of one call: row r is head r % num_heads of sequence r / num_heads.
struct TopkRows {
  const void* score;         // [batch, head, num_tokens] by strides or, packed, [head, num_tokens]; last dim contiguous
  const uint8_t* keep_mask;  // as score, likewise, 0 or 1; null: none
  const uint8_t* drop_mask;  // as score, likewise; null: none
  const int32_t* cu_seqlens;  // [num_rows / num_heads + 1]; null: dense
  IndexPtr row_k;             // [num_rows], clamped to [0, k]; null data: every row keeps k
  int64_t* kept_idx;          // [num_rows, k], -1 past num_kept
  int64_t* rest_idx;  // [num_rows, num_rest], the tokens that are not kept, ascending, then -1; null: not wanted
  int32_t* num_kept;  // [num_rows]; null: not wanted
  int64_t num_rows, num_heads;
  int64_t num_tokens;  // of a row when dense, of all sequences when packed
  int64_t max_seqlen;  // longest row that is looked at; num_tokens when dense
  int64_t k, num_rest;
  int64_t keep_first, keep_last;  // tokens forced at each end of a row
  RowStrides score_stride, keep_stride, drop_stride;
  DType dtype;
  bool by_score;        // kept_idx by falling score instead of by index
  uint32_t* workspace;  // CUDA: topk_workspace_words(...)
};

// The tokens of one sequence, as positions in score.
TOKRED_HOST_DEVICE TokenSpan topk_span(const TopkRows& a, int64_t batch_idx) {
  return token_span(a.cu_seqlens, a.num_tokens, a.max_seqlen, batch_idx);
}

template <typename T>
TOKRED_HOST_DEVICE TopkRow<T> topk_row(const TopkRows& a, int64_t row) {
  const int64_t batch_idx = row / a.num_heads, head_idx = row - batch_idx * a.num_heads;
  const TokenSpan span = topk_span(a, batch_idx);
  const auto at = [&](const RowStrides& stride) {
    return batch_idx * stride.batch + head_idx * stride.head + span.begin;
  };
  TopkRow<T> out{static_cast<const T*>(a.score) + at(a.score_stride), 1, nullptr, nullptr,
                 static_cast<int32_t>(span.len)};
  if (a.keep_mask) out.keep = a.keep_mask + at(a.keep_stride);
  if (a.drop_mask) out.drop = a.drop_mask + at(a.drop_stride);
  out.keep_before = static_cast<int32_t>(a.keep_first < span.len ? a.keep_first : span.len);
  out.keep_from = static_cast<int32_t>(a.keep_last < span.len ? span.len - a.keep_last : 0);
  return out;
}

// How many tokens the row may keep.
TOKRED_HOST_DEVICE int64_t topk_count(const TopkRows& a, int64_t row) {
  if (!a.row_k.data) return a.k;
  const int64_t k = a.row_k[row];
  return k < 0 ? 0 : k < a.k ? k : a.k;
}

// Writes kept_idx, num_kept and rest_idx.
void topk_rows_cpu(const TopkRows& rows);

// ---- CUDA

constexpr int kTopkWarpTokens = 1024, kTopkWarpSorted = 256, kTopkWarpsPerBlock = 4;  // a warp's row
constexpr int kTopkBlockTokens = 8192;   // a block's row, or a chunk of a longer one, in registers
constexpr int kTopkChunkThreads = 256;   // 32 keys a thread: enough loads in flight, four blocks on an SM
constexpr int kTopkStreamThreads = 512;  // of a block that reads its row anew: with 1024 it would spill registers
constexpr int kTopkListed = 4096;        // longest list that a block holds, completes and sorts in shared memory
constexpr int kTopkSample = 4096;        // tokens of a long row that give its pivot
constexpr int kTopkMinSlots = 32, kTopkMaxCandidates = 32768;  // of a chunk; of all chunks of a row
constexpr int kTopkMaxChunks = kTopkMaxCandidates / kTopkMinSlots;

// How the CUDA path selects. Pure: a function of sizes alone.
struct TopkPolicy {
  bool warps;       // one warp per row, several rows per block
  int threads;      // of a block with a row of its own, which holds threads * items keys in registers
  int items;        // 0: the row is read anew in each round
  int num_chunks;   // > 0: blocks first cut chunks of the row down to candidates, in a workspace
  int chunk_slots;  // candidates per chunk, at most
  bool listed;      // the list is completed and sorted in shared memory by the block that selects
};

constexpr TopkPolicy choose_topk_policy(int64_t max_seqlen, int64_t k, bool by_score) {
  TopkPolicy policy{false, 1024, 8, 0, 0, k <= kTopkListed};
  if (max_seqlen <= kTopkWarpTokens && k <= (by_score ? kTopkWarpSorted : kTopkWarpTokens)) {
    policy.warps = true;
  } else if (max_seqlen <= kTopkBlockTokens) {
    policy.threads = max_seqlen <= 1024 ? 256 : 1024;
    policy.items = max_seqlen <= 2 * policy.threads ? 2 : max_seqlen <= 4 * policy.threads ? 4 : 8;
  } else {
    policy.threads = kTopkStreamThreads;
    policy.items = 0;
    const int64_t chunks = ceil_div<int64_t>(max_seqlen, kTopkBlockTokens);
    const int64_t slots = k < kTopkMinSlots ? kTopkMinSlots : k < kTopkBlockTokens ? k : kTopkBlockTokens;
    if (chunks * slots <= kTopkMaxCandidates) {
      policy.num_chunks = static_cast<int>(chunks);
      policy.chunk_slots = static_cast<int>(slots);
    }
  }
  return policy;
}

// What the selection knows of a long row, then the number of candidates of each chunk, then their keys and tokens.
struct TopkRowState {
  uint32_t pivot;     // candidates reach it
  uint32_t eligible;  // tokens that may be kept
  uint32_t crowded;   // more are forced than may be kept: only they compete
};
constexpr int64_t topk_workspace_words(const TopkPolicy& policy, int64_t num_rows) {
  return policy.num_chunks == 0 ? 0 : num_rows * (3 + policy.num_chunks * (1 + 2 * int64_t{policy.chunk_slots}));
}

// Adds the launches of such a selection.
void plan_topk_rows(Plan& plan, const TopkPolicy& policy, int64_t num_rows);

// Writes kept_idx and num_kept; rest_idx and the order by score only if the policy says listed. Returns a cudaError_t.
int topk_rows_cuda(const TopkRows& rows, const TopkPolicy& policy, CUstream_st* stream);

}  // namespace tokred
