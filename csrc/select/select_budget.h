// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/cut_rows.h"

namespace tokred {

struct BudgetArgs {
  TopkRows rows;    // the heads of a sequence share a budget; k: length of the lists
  int64_t total;    // tokens that the heads of a sequence keep together
  int64_t floor;    // the best of each head that are kept before the heads compete
  double share;     // then a head's count is share times what it won,
  int64_t least;    // plus this, rounded half to even
  uint8_t* floors;  // with a floor: [num_rows, num_tokens] or, packed, [num_heads, num_tokens]
  int32_t* counts;  // [num_rows]
};

// Calls cut for each of the steps: the floors as a mask, the count of each head, the lists. Stops at an error, not 0.
template <typename Cut>
int budget_steps(const BudgetArgs& a, Cut&& cut) {
  CutRows step{};
  step.rule = CutRule::kCount;
  step.rows = a.rows;
  step.rows_per_group = 1;
  if (a.floor > 0) {
    step.count = a.floor;
    step.kept_mask = a.floors;
    if (const int error = cut(step)) return error;
    step.kept_mask = nullptr;
    step.rows.keep_mask = a.floors;
    const int64_t heads = a.rows.num_heads, num_tokens = a.rows.num_tokens;
    step.rows.keep_stride = {a.rows.cu_seqlens ? 0 : heads * num_tokens, num_tokens};
  }
  step.rows_per_group = a.rows.num_heads;
  step.count = a.total;
  step.row_count = a.counts;
  step.row_share = a.share;
  step.row_least = a.least;
  if (const int error = cut(step)) return error;
  step.rows_per_group = 1;
  step.row_count = nullptr;
  step.rows.row_k = {a.counts, false};
  return cut(step);
}

// Of the step that needs the most.
inline int64_t budget_workspace_bytes(const BudgetArgs& args) {
  int64_t bytes = 0;
  (void)budget_steps(args, [&](const CutRows& step) {
    const int64_t needed = cut_workspace_bytes(step, choose_cut_policy(step));
    bytes = needed > bytes ? needed : bytes;
    return 0;
  });
  return bytes;
}

void select_budget_cpu(const BudgetArgs& args);
int select_budget_cuda(const BudgetArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
