// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_rule.h"

#include <cmath>
#include <utility>

#include "torch/glue_scores.h"

namespace tokred {
namespace {

struct NamedRule {
  const char* name;
  CutRule rule;
  bool share;  // its value is one: in [0, 1]
};
constexpr NamedRule kRules[] = {{"threshold", CutRule::kThreshold, false},
                                {"top_p", CutRule::kMass, true},
                                {"coverage", CutRule::kMass, true},
                                {"quantile", CutRule::kQuantile, true},
                                {"iqr", CutRule::kIqr, false},
                                {"ratio", CutRule::kShare, true},
                                {"stride", CutRule::kThreshold, false},
                                {"multinomial", CutRule::kLottery, true}};

const NamedRule& find_rule(const std::string& name) {
  for (const NamedRule& rule : kRules) {
    if (name == rule.name) return rule;
  }
  std::string names;
  for (const NamedRule& rule : kRules) names += concat(names.empty() ? "'" : ", '", rule.name, "'");
  throw std::runtime_error(concat("select_rule: expected rule one of ", names, ", got '", name, "'"));
}

// A value that may differ between rows, as float32.
const float* check_values(const char* name, const OptTensor& x, const Tensor& score, const RowsCall& rows) {
  if (!x) return nullptr;
  check_dtype("select_rule", name, *x, ScalarType::Float);
  check_per_row("select_rule", name, *x, score, rows);
  return static_cast<const float*>(x->const_data_ptr());
}

using Run = void (*)(const CutRows& args, const Tensor& score);

void run_cpu(const CutRows& args, const Tensor&) { select_rule_cpu(args); }
[[maybe_unused]] void run_cuda(const CutRows& args, const Tensor& score) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(score);
  CutRows with_workspace = args;
  const int64_t words = cut_workspace_bytes(args, choose_policy(args)) / 8;
  Tensor workspace = new_empty(score, {words}, ScalarType::Long);
  with_workspace.rows.workspace = static_cast<uint32_t*>(workspace.mutable_data_ptr());
  check_cuda("select_rule", select_rule_cuda(with_workspace, device.stream()));
#endif
}

template <Run run>
std::tuple<Tensor, Tensor> select_rule(const Tensor& score, const std::string& rule, double value,
                                       const OptTensor& row_value, const OptTensor& other, double other_value,
                                       const OptTensor& row_other_value, const OptTensor& weight,
                                       const OptTensor& keep_mask, const OptTensor& drop_mask,
                                       const OptTensor& cu_seqlens, int64_t max_seqlen, int64_t min_k, int64_t max_k,
                                       int64_t keep_first, int64_t keep_last, int64_t stride, int64_t offset,
                                       double temperature, const std::string& rounding, bool strict, int64_t seed,
                                       const std::string& order) {
  RowsCall rows = check_scores("select_rule", score, cu_seqlens, max_seqlen);
  check_length("select_rule", "max_k", max_k, rows);
  TOKRED_CHECK(min_k >= 0 && min_k <= max_k, "select_rule: expected min_k in [0, max_k = ", max_k, "], got ", min_k);
  check_windows("select_rule", keep_first, keep_last, rows);
  check_order("select_rule", order, rows);
  check_masks("select_rule", keep_mask, drop_mask, score, rows);

  const NamedRule& named = find_rule(rule);
  CutRows args{};
  args.rule = named.rule;
  TOKRED_CHECK(!std::isnan(value), "select_rule: expected a value that is a number, got nan");
  TOKRED_CHECK(!named.share || row_value || (value >= 0 && value <= 1), "select_rule: expected value in [0, 1] for '",
               rule, "', got ", value);
  TOKRED_CHECK(rounding == "floor" || rounding == "round" || rounding == "ceil",
               "select_rule: expected rounding 'floor', 'round' or 'ceil', got '", rounding, "'");
  args.rounding = rounding == "floor" ? Rounding::kFloor : rounding == "ceil" ? Rounding::kCeil : Rounding::kRound;
  args.value = value;
  args.row_value = check_values("value", row_value, score, rows);
  args.min_k = min_k;
  args.strict = named.rule == CutRule::kMass ? rule == "top_p" : strict;
  TOKRED_CHECK(temperature >= 0 && temperature < INFINITY, "select_rule: expected temperature > 0, got ", temperature);
  args.softmax = temperature > 0;
  if (args.softmax) args.exp2_scale = 1.4426950408889634 / temperature * 0x1p30;
  if (rule == "stride") {
    TOKRED_CHECK(stride >= 1, "select_rule: expected a stride >= 1 as value, got ", stride);
    TOKRED_CHECK(offset >= 0, "select_rule: expected offset >= 0, got ", offset);
    args.value = NAN;  // no score reaches it: what the stride names is forced, and nothing else
    check_int32_range("select_rule", "value", stride);
    check_int32_range("select_rule", "offset", offset);
    args.stride = static_cast<int32_t>(stride);
    args.offset = static_cast<int32_t>(offset);
  }
  if (other) {
    TOKRED_CHECK(rule == "threshold", "select_rule: expected other with rule 'threshold', got rule '", rule, "'");
    TOKRED_CHECK(other->scalar_type() == score.scalar_type(), "select_rule: expected other of the dtype of score (",
                 dtype_of(score), "), got ", dtype_of(*other));
    check_like_score("select_rule", "other", *other, score);
    args.other = other->const_data_ptr();
    args.other_stride = strides_between_rows(*other, rows.packed);
    args.other_value = other_value;
    args.row_other_value = check_values("other_value", row_other_value, score, rows);
  }
  if (weight) {
    TOKRED_CHECK(rule == "quantile", "select_rule: expected weight with rule 'quantile', got rule '", rule, "'");
    args.weight = check_index("select_rule", "weight", *weight);
    check_like_score("select_rule", "weight", *weight, score);
    args.weight_stride = strides_between_rows(*weight, rows.packed);
  }
  args.seed = static_cast<uint64_t>(seed);
  args.rows_per_group = 1;
  args.rows = rows.args;
  args.rows.k = max_k;

  Tensor kept_idx = new_empty(score, with_last(rows.lead, max_k), ScalarType::Long);
  Tensor num_kept = new_empty(score, rows.lead, ScalarType::Int);
  args.rows.kept_idx = static_cast<int64_t*>(kept_idx.mutable_data_ptr());
  args.rows.num_kept = static_cast<int32_t*>(num_kept.mutable_data_ptr());
  run(args, score);
  return {kept_idx, num_kept};
}

// Sizes: num_rows, num_tokens; max_k, by_score (0 or 1), if they matter.
Plan plan_select_rule(const PlanSizes& sizes) {
  CutRows args{};
  args.rule = CutRule::kMass;
  args.rows_per_group = 1;
  args.rows.num_rows = sizes["num_rows"];
  args.rows.max_seqlen = sizes["num_tokens"];
  args.rows.k = sizes.get("max_k", args.rows.max_seqlen);
  args.rows.by_score = sizes.get("by_score", 0) != 0;
  Plan plan;
  plan_cut_rows(plan, args);
  return plan;
}
TOKRED_PLAN(select_rule, plan_select_rule)

TOKRED_SCHEMA(m) {
  m.def(
      "select_rule(Tensor score, str rule, float value=0., Tensor? row_value=None, Tensor? other=None,"
      " float other_value=0., Tensor? row_other_value=None, Tensor? weight=None, Tensor? keep_mask=None,"
      " Tensor? drop_mask=None, Tensor? cu_seqlens=None, SymInt max_seqlen=0, SymInt min_k=0, SymInt max_k=0,"
      " SymInt keep_first=0, SymInt keep_last=0, SymInt stride=0, SymInt offset=0, float temperature=0.,"
      " str rounding='floor', bool strict=False, SymInt seed=0, str order='index')"
      " -> (Tensor kept_idx, Tensor num_kept)");
}
TOKRED_IMPL_CPU(m) { m.impl("select_rule", TORCH_BOX(&select_rule<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("select_rule", TORCH_BOX(&select_rule<run_cuda>)); }

}  // namespace
}  // namespace tokred
