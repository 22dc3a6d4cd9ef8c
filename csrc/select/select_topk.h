// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/sort_lists.h"
#include "common/topk_rows.h"

namespace tokred {

constexpr int kSelectTopkThreads = 256;

// In words of 4 bytes: of the selection, then of the sort of a list too long for the selecting block. Each starts at 8
// bytes.
constexpr int64_t select_topk_sort_offset(const TopkPolicy& policy, int64_t num_rows) {
  return ceil_div<int64_t>(topk_workspace_words(policy, num_rows), 2) * 2;
}
constexpr int64_t select_topk_workspace_words(const TopkPolicy& policy, const TopkRows& a) {
  const bool sorts = a.by_score && !policy.listed;
  return select_topk_sort_offset(policy, a.num_rows) + (sorts ? sort_lists_bytes(a.num_rows, a.k) / 4 : 0);
}

inline TopkPolicy choose_policy(const TopkRows& a) { return choose_topk_policy(a.max_seqlen, a.k, a.by_score); }

void select_topk_cpu(const TopkRows& args);
int select_topk_cuda(const TopkRows& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
