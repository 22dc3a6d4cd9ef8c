// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/copy_rows.h"
#include "common/topk_rows.h"

namespace tokred {

constexpr int kPruneTopkMaxTensors = 16;  // x and companions; their descriptors travel as kernel arguments

struct PruneTopkArgs {
  TopkRows rows;                            // one head; neither rest_idx nor by_score
  RowTensor tensors[kPruneTopkMaxTensors];  // x first; dst [batch_size, k, row]
  int num_tensors;
};

// How the CUDA path runs a call. Pure: a function of sizes alone.
struct PruneTopkPolicy {
  bool fused;          // the selecting blocks also copy: one launch; each repeats the selection, which is short
  int threads, items;  // of a fused block, which holds threads * items keys in registers
  TopkPolicy select;   // else
};

constexpr PruneTopkPolicy choose_policy(int64_t max_seqlen, int64_t k) {
  // A packed call may ask for more slots than its rows have tokens; a list that long is not kept in shared memory.
  const bool fused = max_seqlen <= 4096 && k <= kTopkListed;
  const int threads = max_seqlen <= 1024 ? 256 : 1024;
  const int items = max_seqlen <= threads ? 1 : max_seqlen <= 2 * threads ? 2 : 4;
  return {fused, threads, items, choose_topk_policy(max_seqlen, k, /*by_score=*/false)};
}

// Blocks per row of a fused launch: enough for 16 KiB of output each, as many as fill a large GPU at most.
constexpr int64_t prune_topk_splits(int64_t batch_size, int64_t k, int64_t row_bytes) {
  const int64_t wanted = ceil_div<int64_t>(k * row_bytes, 16384), room = ceil_div<int64_t>(264, batch_size + 1);
  return wanted < 1 ? 1 : wanted < room ? wanted : room;
}

// Adds the launches of such a call.
void plan_prune_topk(Plan& plan, int64_t batch_size, int64_t max_seqlen, int64_t k, int64_t row_bytes);

void prune_topk_cpu(const PruneTopkArgs& args);
int prune_topk_cuda(const PruneTopkArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
