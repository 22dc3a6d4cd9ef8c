// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/bipartite_match.h"

#include "torch/glue.h"

namespace tokred {
namespace {

MatchOrder parse_order(const std::string& order) {
  if (order == "index") return MatchOrder::kIndex;
  if (order == "grouped") return MatchOrder::kGrouped;
  TOKRED_CHECK(order == "score", "bipartite_match: expected order \"index\", \"grouped\" or \"score\", got \"", order,
               "\"");
  return MatchOrder::kScore;
}

using Run = void (*)(BipartiteMatchArgs& args, const Tensor& metric);

void run_cpu(BipartiteMatchArgs& args, const Tensor&) { bipartite_match_cpu(args); }
[[maybe_unused]] void run_cuda(BipartiteMatchArgs& args, const Tensor& metric) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(metric);
  const BipartiteMatchPolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.metric));
  const BipartiteSets sets = bipartite_sets(args.num_tokens, args.num_protected);
  Tensor partial = new_empty(metric, {policy.num_splits, args.batch_size, sets.candidate_src()}, ScalarType::Long);
  args.partial = static_cast<uint64_t*>(partial.mutable_data_ptr());
  check_cuda("bipartite_match", bipartite_match_cuda(args, device.stream()));
#endif
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> match(const Tensor& metric, int64_t r, const OptTensor& protect,
                                         int64_t num_protected, bool normalize, double eps, const std::string& order) {
  TOKRED_CHECK(metric.dim() == 3, "bipartite_match: expected metric of shape [batch_size, num_tokens, dim], got ",
               shape_of(metric));
  const DType dtype = check_float("bipartite_match", "metric", metric);
  check_last_dim("bipartite_match", "metric", metric);
  const int64_t batch_size = metric.size(0), num_tokens = metric.size(1);
  check_int32_range("bipartite_match", "num_tokens", num_tokens);
  TOKRED_CHECK(num_protected >= 0 && num_protected <= num_tokens, "bipartite_match: expected num_protected in [0, ",
               num_tokens, "], got ", num_protected);
  const BipartiteSets sets = bipartite_sets(num_tokens, num_protected);
  const int64_t max_r = sets.candidate_dst() > 0 ? sets.candidate_src() : 0;
  TOKRED_CHECK(
      r >= 0 && r <= max_r, "bipartite_match: expected r in [0, ", max_r,
      "], the number of unprotected sources (even tokens) when there is an unprotected destination (odd token), "
      "got ",
      r);
  TOKRED_CHECK(eps >= 0, "bipartite_match: expected eps >= 0, got ", eps);
  if (protect) {
    check_dtype("bipartite_match", "protect", *protect, ScalarType::Bool);
    check_same_device("bipartite_match", "metric", metric, "protect", *protect);
    check_shape("bipartite_match", "protect", *protect, {batch_size, num_tokens}, "[batch_size, num_tokens]");
    check_contiguous("bipartite_match", "protect", *protect);
  }
  BipartiteMatchArgs args{};
  args.order = parse_order(order);

  Tensor dst_idx = new_empty(metric, {batch_size, num_tokens}, ScalarType::Long);
  Tensor match_idx = new_empty(metric, {batch_size, num_tokens}, ScalarType::Long);
  Tensor score = new_empty(metric, {batch_size, num_tokens}, ScalarType::Float);
  args.metric = metric.const_data_ptr();
  args.protect = data_or_null<uint8_t>(protect);
  args.dst_idx = static_cast<int64_t*>(dst_idx.mutable_data_ptr());
  args.match_idx = static_cast<int64_t*>(match_idx.mutable_data_ptr());
  args.score = static_cast<float*>(score.mutable_data_ptr());
  args.batch_size = batch_size;
  args.num_tokens = num_tokens;
  args.dim = metric.size(2);
  args.stride_batch = metric.stride(0);
  args.stride_token = metric.stride(1);
  args.r = r;
  args.num_protected = num_protected;
  args.eps = static_cast<float>(eps);
  args.normalize = normalize;
  args.dtype = dtype;
  run(args, metric);
  return {dst_idx, match_idx, score};
}

// Floor: metric read once, 20 bytes written per token; 2 * num_src * num_dst * dim flops per row (thrice that on tensor
// cores for float32).
Plan plan_bipartite_match(const PlanSizes& sizes) {
  BipartiteMatchArgs a{};
  a.batch_size = sizes["batch_size"];
  a.num_tokens = sizes["num_tokens"];
  a.dim = sizes["dim"];
  a.num_protected = sizes.get("num_protected", 0);
  a.stride_token = a.dim;
  a.stride_batch = a.num_tokens * a.dim;
  a.dtype = sizes.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  const BipartiteMatchPolicy policy = choose_policy(a, 0);
  Plan plan;
  plan.launches.push_back({"bipartite_match_kernel", {policy.match_blocks, 1, 1}, 128});
  plan.launches.push_back({"bipartite_number_kernel", {a.batch_size, 1, 1}, policy.number_threads});
  return plan;
}
TOKRED_PLAN(bipartite_match, plan_bipartite_match)

TOKRED_SCHEMA(m) {
  m.def(
      "bipartite_match(Tensor metric, SymInt r, Tensor? protect=None, SymInt num_protected=0, bool normalize=True,"
      " float eps=1e-12, str order=\"index\") -> (Tensor dst_idx, Tensor match_idx, Tensor score)");
}
TOKRED_IMPL_CPU(m) { m.impl("bipartite_match", TORCH_BOX(&match<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("bipartite_match", TORCH_BOX(&match<run_cuda>)); }

}  // namespace
}  // namespace tokred
