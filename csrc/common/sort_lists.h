// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Ascending lists of tokens brought into the order of their scores on CUDA: for lists that no block has at hand.
#pragma once
#include "common/topk_rows.h"

namespace tokred {

constexpr int kSortRunThreads = 1024, kSortMergeThreads = 256;

constexpr int sort_lists_merges(int64_t k) {
  int rounds = 0;
  for (int64_t run = kTopkListed; run < k; run *= 2) ++rounds;
  return rounds;
}

// Two buffers of sort keys.
constexpr int64_t sort_lists_bytes(int64_t num_rows, int64_t k) { return 16 * num_rows * k; }

// Adds the launches.
void plan_sort_lists(Plan& plan, int64_t num_rows, int64_t k);

// Rewrites kept_idx, which ascends in num_kept, by falling score; empty slots stay last. Returns a cudaError_t.
int sort_lists_cuda(const TopkRows& rows, unsigned long long* workspace, CUstream_st* stream);

}  // namespace tokred
