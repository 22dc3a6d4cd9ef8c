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
  const int64_t num_slots = bipartite_slots(args).num_src;
  Tensor partial = new_empty(metric, {policy.num_splits, args.batch_size, num_slots}, ScalarType::Long);
  args.partial = static_cast<uint64_t*>(partial.mutable_data_ptr());
  check_cuda("bipartite_match", bipartite_match_cuda(args, device.stream()));
#endif
}

struct Call {
  BipartiteMatchArgs args;
  Tensor dst_idx, match_idx, score;
};

// [batch_size, count] of whole numbers, a batch stride of 0 where one list serves all rows.
MatchList check_list(const char* name, const Tensor& list, const Tensor& metric) {
  TOKRED_CHECK(list.scalar_type() == ScalarType::Long || list.scalar_type() == ScalarType::Int,
               "bipartite_match: expected ", name, " of dtype int64 or int32, got ", dtype_of(list));
  TOKRED_CHECK(list.dim() == 2 && list.size(0) == metric.size(0), "bipartite_match: expected ", name,
               " of shape [batch_size, count] with batch_size ", metric.size(0), ", got ", shape_of(list));
  check_last_dim("bipartite_match", name, list);
  check_same_device("bipartite_match", "metric", metric, name, list);
  check_int32_range("bipartite_match", name, list.size(1));
  return {{list.const_data_ptr(), list.scalar_type() == ScalarType::Long}, list.size(1), list.stride(0)};
}

// A contiguous tensor beside metric.
template <typename T>
const T* check_beside(const char* name, const OptTensor& x, const Tensor& metric, ScalarType dtype,
                      const std::vector<int64_t>& shape, const char* meaning) {
  if (!x) return nullptr;
  check_dtype("bipartite_match", name, *x, dtype);
  check_same_device("bipartite_match", "metric", metric, name, *x);
  check_shape("bipartite_match", name, *x, shape, meaning);
  check_contiguous("bipartite_match", name, *x);
  return data_or_null<T>(x);
}

Call prepare(const Tensor& metric, int64_t r, const OptTensor& protect, int64_t num_protected, bool normalize,
             double eps, const std::string& order, const OptTensor& sources, const OptTensor& destinations) {
  TOKRED_CHECK(metric.dim() == 3, "bipartite_match: expected metric of shape [batch_size, num_tokens, dim], got ",
               shape_of(metric));
  BipartiteMatchArgs args{};
  args.dtype = check_float("bipartite_match", "metric", metric);
  check_last_dim("bipartite_match", "metric", metric);
  const int64_t batch_size = metric.size(0), num_tokens = metric.size(1);
  check_int32_range("bipartite_match", "num_tokens", num_tokens);
  TOKRED_CHECK(num_protected >= 0 && num_protected <= num_tokens, "bipartite_match: expected num_protected in [0, ",
               num_tokens, "], got ", num_protected);
  TOKRED_CHECK(sources.has_value() == destinations.has_value(),
               "bipartite_match: expected sources and destinations together, got ",
               sources ? "sources" : "destinations", " alone");
  if (sources) {
    TOKRED_CHECK(num_protected == 0, "bipartite_match: expected num_protected 0 with sources, got ", num_protected);
    args.source = check_list("sources", *sources, metric);
    args.destination = check_list("destinations", *destinations, metric);
  }
  args.batch_size = batch_size;
  args.num_tokens = num_tokens;
  args.num_protected = num_protected;
  const BipartiteRow slots = bipartite_slots(args);
  const int64_t max_r = slots.num_dst > 0 ? slots.num_src : 0;
  const char* meaning = sources ? "the number of sources when there is a destination"
                                : "the number of unprotected sources (even tokens) when there is an unprotected "
                                  "destination (odd token)";
  TOKRED_CHECK(r >= 0 && r <= max_r, "bipartite_match: expected r in [0, ", max_r, "], ", meaning, ", got ", r);
  TOKRED_CHECK(eps >= 0, "bipartite_match: expected eps >= 0, got ", eps);
  args.protect = check_beside<uint8_t>("protect", protect, metric, ScalarType::Bool, {batch_size, num_tokens},
                                       "[batch_size, num_tokens]");
  args.order = parse_order(order);

  Tensor dst_idx = new_empty(metric, {batch_size, num_tokens}, ScalarType::Long);
  Tensor match_idx = new_empty(metric, {batch_size, num_tokens}, ScalarType::Long);
  Tensor score = new_empty(metric, {batch_size, num_tokens}, ScalarType::Float);
  args.metric = metric.const_data_ptr();
  args.dst_idx = static_cast<int64_t*>(dst_idx.mutable_data_ptr());
  args.match_idx = static_cast<int64_t*>(match_idx.mutable_data_ptr());
  args.score = static_cast<float*>(score.mutable_data_ptr());
  args.dim = metric.size(2);
  args.stride_batch = metric.stride(0);
  args.stride_token = metric.stride(1);
  args.r = r;
  args.eps = static_cast<float>(eps);
  args.normalize = normalize;
  return {args, dst_idx, match_idx, score};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> match(const Tensor& metric, int64_t r, const OptTensor& protect,
                                         int64_t num_protected, bool normalize, double eps, const std::string& order) {
  Call call = prepare(metric, r, protect, num_protected, normalize, eps, order, std::nullopt, std::nullopt);
  run(call.args, metric);
  return {call.dst_idx, call.match_idx, call.score};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor, Tensor> full(const Tensor& metric, int64_t r, const OptTensor& protect,
                                                int64_t num_protected, bool normalize, double eps,
                                                const std::string& order, const OptTensor& sources,
                                                const OptTensor& destinations, const OptTensor& weight, double offset,
                                                const OptTensor& group, bool ragged, double threshold,
                                                const OptTensor& row_threshold, const OptTensor& seq_lens) {
  Call call = prepare(metric, r, protect, num_protected, normalize, eps, order, sources, destinations);
  BipartiteMatchArgs& args = call.args;
  const std::vector<int64_t> per_token{metric.size(0), metric.size(1)}, per_row{metric.size(0)};
  args.weight = check_beside<float>("weight", weight, metric, ScalarType::Float, per_token, "[batch_size, num_tokens]");
  args.group = check_beside<int32_t>("group", group, metric, ScalarType::Int, per_token, "[batch_size, num_tokens]");
  args.row_threshold =
      check_beside<float>("threshold", row_threshold, metric, ScalarType::Float, per_row, "[batch_size]");
  args.seq_lens = check_beside<int32_t>("seq_lens", seq_lens, metric, ScalarType::Int, per_row, "[batch_size]");
  args.offset = static_cast<float>(offset);
  args.ragged = ragged;
  args.threshold = static_cast<float>(threshold);
  Tensor num_kept = new_empty(metric, per_row, ScalarType::Int);
  args.num_kept = static_cast<int32_t*>(num_kept.mutable_data_ptr());
  run(args, metric);
  return {call.dst_idx, call.match_idx, call.score, num_kept};
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
  m.def(
      "bipartite_match.full(Tensor metric, SymInt r, Tensor? protect=None, SymInt num_protected=0, bool normalize=True,"
      " float eps=1e-12, str order=\"index\", Tensor? sources=None, Tensor? destinations=None, Tensor? weight=None,"
      " float offset=0.0, Tensor? group=None, bool ragged=False, float threshold=0.0, Tensor? row_threshold=None,"
      " Tensor? seq_lens=None) -> (Tensor dst_idx, Tensor match_idx, Tensor score, Tensor num_kept)");
}
TOKRED_IMPL_CPU(m) {
  m.impl("bipartite_match", TORCH_BOX(&match<run_cpu>));
  m.impl("bipartite_match.full", TORCH_BOX(&full<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("bipartite_match", TORCH_BOX(&match<run_cuda>));
  m.impl("bipartite_match.full", TORCH_BOX(&full<run_cuda>));
}

}  // namespace
}  // namespace tokred
