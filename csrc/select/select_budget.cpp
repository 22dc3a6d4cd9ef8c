// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_budget.h"

#include "torch/glue_scores.h"

namespace tokred {
namespace {

using Run = void (*)(const BudgetArgs& args, const Tensor& score);

void run_cpu(const BudgetArgs& args, const Tensor&) { select_budget_cpu(args); }
[[maybe_unused]] void run_cuda(const BudgetArgs& args, const Tensor& score) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(score);
  BudgetArgs with_workspace = args;
  Tensor workspace = new_empty(score, {budget_workspace_bytes(args) / 8}, ScalarType::Long);
  with_workspace.rows.workspace = static_cast<uint32_t*>(workspace.mutable_data_ptr());
  check_cuda("select_budget", select_budget_cuda(with_workspace, device.stream()));
#endif
}

template <Run run>
std::tuple<Tensor, Tensor> select_budget(const Tensor& score, int64_t budget, int64_t max_k, const OptTensor& keep_mask,
                                         const OptTensor& drop_mask, const OptTensor& cu_seqlens, int64_t max_seqlen,
                                         double alpha, const std::string& rule, const std::string& order) {
  RowsCall rows = check_scores("select_budget", score, cu_seqlens, max_seqlen);
  TOKRED_CHECK(rows.lead.size() == 2, "select_budget: expected a score per head, ",
               rows.packed ? "[num_heads, total_tokens]" : "[batch_size, num_heads, num_tokens]", ", got ",
               shape_of(score));
  check_length("select_budget", "budget", budget, rows);
  check_length("select_budget", "max_k", max_k, rows);
  check_order("select_budget", order, rows);
  check_masks("select_budget", keep_mask, drop_mask, score, rows);
  check_int32_range("select_budget", "num_heads * num_tokens", rows.args.num_heads * rows.args.max_seqlen);
  TOKRED_CHECK(alpha >= 0 && alpha <= 1, "select_budget: expected alpha in [0, 1], got ", alpha);
  TOKRED_CHECK(rule == "exact" || rule == "rounded", "select_budget: expected rule 'exact' or 'rounded', got '", rule,
               "'");
  const int64_t least = static_cast<int64_t>(static_cast<double>(budget) * alpha);
  const bool exact = rule == "exact";
  rows.args.k = max_k;
  Tensor kept_idx = new_empty(score, with_last(rows.lead, max_k), ScalarType::Long);
  Tensor num_kept = new_empty(score, rows.lead, ScalarType::Int);
  Tensor counts = new_empty(score, rows.lead, ScalarType::Int);
  const std::vector<int64_t> none{0};
  const std::vector<int64_t> like_score =
      rows.packed ? std::vector<int64_t>{score.size(0), score.size(1)} : with_last(rows.lead, score.size(2));
  Tensor floors = new_empty(score, exact && least > 0 ? like_score : none, ScalarType::Byte);
  rows.args.kept_idx = static_cast<int64_t*>(kept_idx.mutable_data_ptr());
  rows.args.num_kept = static_cast<int32_t*>(num_kept.mutable_data_ptr());
  run({rows.args, budget * rows.args.num_heads, exact ? least : 0, exact ? 1 : 1 - alpha, exact ? 0 : least,
       static_cast<uint8_t*>(floors.mutable_data_ptr()), static_cast<int32_t*>(counts.mutable_data_ptr())},
      score);
  return {kept_idx, num_kept};
}

// Sizes: batch_size, num_heads, num_tokens; max_k, floor (0: none), by_score (0 or 1), if they matter.
Plan plan_select_budget(const PlanSizes& sizes) {
  BudgetArgs args{};
  args.rows.num_heads = sizes["num_heads"];
  args.rows.num_rows = sizes["batch_size"] * args.rows.num_heads;
  args.rows.num_tokens = args.rows.max_seqlen = sizes["num_tokens"];
  args.rows.k = sizes.get("max_k", args.rows.max_seqlen);
  args.rows.by_score = sizes.get("by_score", 0) != 0;
  args.floor = sizes.get("floor", 0);
  uint8_t mask;  // a plan looks at whether there is one
  int32_t count;
  args.floors = &mask;
  args.counts = &count;
  Plan plan;
  (void)budget_steps(args, [&](const CutRows& step) {
    plan_cut_rows(plan, step);
    return 0;
  });
  return plan;
}
TOKRED_PLAN(select_budget, plan_select_budget)

TOKRED_SCHEMA(m) {
  m.def(
      "select_budget(Tensor score, SymInt budget, SymInt max_k, Tensor? keep_mask=None, Tensor? drop_mask=None,"
      " Tensor? cu_seqlens=None, SymInt max_seqlen=0, float alpha=0., str rule='exact', str order='index')"
      " -> (Tensor kept_idx, Tensor num_kept)");
}
TOKRED_IMPL_CPU(m) { m.impl("select_budget", TORCH_BOX(&select_budget<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("select_budget", TORCH_BOX(&select_budget<run_cuda>)); }

}  // namespace
}  // namespace tokred
