// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_topk.h"

#include "torch/glue_scores.h"

namespace tokred {
namespace {

struct Call {
  TopkRows args;
  std::vector<int64_t> lead;  // [batch_size] or [batch_size, num_heads]
  Tensor kept_idx;
};

Call prepare(const Tensor& score, int64_t k, const OptTensor& row_k, const OptTensor& keep_mask,
             const OptTensor& drop_mask, const OptTensor& cu_seqlens, int64_t max_seqlen, int64_t keep_first,
             int64_t keep_last, const std::string& order) {
  RowsCall rows = check_scores("select_topk", score, cu_seqlens, max_seqlen);
  check_length("select_topk", row_k ? "max_k" : "k", k, rows);
  if (row_k) {
    check_per_row("select_topk", "k", *row_k, score, rows);
    rows.args.row_k = check_index("select_topk", "k", *row_k);
  }
  check_windows("select_topk", keep_first, keep_last, rows);
  check_order("select_topk", order, rows);
  check_masks("select_topk", keep_mask, drop_mask, score, rows);
  rows.args.k = k;
  Tensor kept_idx = new_empty(score, with_last(rows.lead, k), ScalarType::Long);
  rows.args.kept_idx = static_cast<int64_t*>(kept_idx.mutable_data_ptr());
  return {rows.args, rows.lead, kept_idx};
}

using Run = void (*)(const TopkRows& args, const Tensor& score);

void run_cpu(const TopkRows& args, const Tensor&) { select_topk_cpu(args); }
[[maybe_unused]] void run_cuda(const TopkRows& args, const Tensor& score) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(score);
  TopkRows with_workspace = args;
  Tensor workspace = new_empty(score, {select_topk_workspace_words(choose_policy(args), args)}, ScalarType::Int);
  with_workspace.workspace = static_cast<uint32_t*>(workspace.mutable_data_ptr());
  check_cuda("select_topk", select_topk_cuda(with_workspace, device.stream()));
#endif
}

template <Run run>
Tensor plain(const Tensor& score, int64_t k, const OptTensor& keep_mask, const OptTensor& drop_mask) {
  Call call = prepare(score, k, std::nullopt, keep_mask, drop_mask, std::nullopt, 0, 0, 0, "index");
  run(call.args, score);
  return call.kept_idx;
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> full(const Tensor& score, int64_t k, const OptTensor& row_k,
                                        const OptTensor& keep_mask, const OptTensor& drop_mask,
                                        const OptTensor& cu_seqlens, int64_t max_seqlen, int64_t keep_first,
                                        int64_t keep_last, const std::string& order, bool complement) {
  Call call = prepare(score, k, row_k, keep_mask, drop_mask, cu_seqlens, max_seqlen, keep_first, keep_last, order);
  Tensor num_kept = new_empty(score, call.lead, ScalarType::Int);
  call.args.num_kept = static_cast<int32_t*>(num_kept.mutable_data_ptr());
  // Where every row is certain to keep k the rest has one size; else there is room for all.
  const bool certain = !cu_seqlens && !row_k && !drop_mask;
  call.args.num_rest = certain ? call.args.num_tokens - k : call.args.max_seqlen;
  const std::vector<int64_t> none{0};
  Tensor rest_idx = new_empty(score, complement ? with_last(call.lead, call.args.num_rest) : none, ScalarType::Long);
  if (complement) call.args.rest_idx = static_cast<int64_t*>(rest_idx.mutable_data_ptr());
  run(call.args, score);
  return {call.kept_idx, num_kept, rest_idx};
}

// Sizes: num_rows, num_tokens, k, element_size; by_score (0 or 1).
Plan plan_select_topk(const PlanSizes& sizes) {
  const int64_t num_rows = sizes["num_rows"], num_tokens = sizes["num_tokens"], k = sizes["k"];
  const bool by_score = sizes.get("by_score", 0) != 0;
  const TopkPolicy policy = choose_topk_policy(num_tokens, k, by_score);
  Plan plan;
  plan_topk_rows(plan, policy, num_rows);
  if (by_score && !policy.listed) plan_sort_lists(plan, num_rows, k);
  return plan;
}
TOKRED_PLAN(select_topk, plan_select_topk)

TOKRED_SCHEMA(m) {
  m.def("select_topk(Tensor score, SymInt k, Tensor? keep_mask=None, Tensor? drop_mask=None) -> Tensor kept_idx");
  m.def(
      "select_topk.full(Tensor score, SymInt k, Tensor? row_k=None, Tensor? keep_mask=None, Tensor? drop_mask=None,"
      " Tensor? cu_seqlens=None, SymInt max_seqlen=0, SymInt keep_first=0, SymInt keep_last=0, str order='index',"
      " bool complement=False) -> (Tensor kept_idx, Tensor num_kept, Tensor rest_idx)");
}
TOKRED_IMPL_CPU(m) {
  m.impl("select_topk", TORCH_BOX(&plain<run_cpu>));
  m.impl("select_topk.full", TORCH_BOX(&full<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("select_topk", TORCH_BOX(&plain<run_cuda>));
  m.impl("select_topk.full", TORCH_BOX(&full<run_cuda>));
}

}  // namespace
}  // namespace tokred
