// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_diverse.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "select_diverse";

DiverseRule parse_rule(const std::string& rule) {
  if (rule == "max_min") return DiverseRule::kMaxMin;
  if (rule == "max_sum") return DiverseRule::kMaxSum;
  TOKRED_CHECK(rule == "mmr", kOp, ": expected rule \"max_min\", \"max_sum\" or \"mmr\", got \"", rule, "\"");
  return DiverseRule::kMmr;
}
DiverseMetric parse_metric(const std::string& metric) {
  if (metric == "cosine") return DiverseMetric::kCosine;
  TOKRED_CHECK(metric == "l2", kOp, ": expected metric \"cosine\" or \"l2\", got \"", metric, "\"");
  return DiverseMetric::kL2;
}
DiverseStart parse_start(const std::string& start) {
  if (start == "farthest") return DiverseStart::kFarthest;
  if (start == "weight") return DiverseStart::kWeight;
  TOKRED_CHECK(start == "first", kOp, ": expected start \"farthest\", \"weight\" or \"first\" (or start_idx), got \"",
               start, "\"");
  return DiverseStart::kFirst;
}
bool parse_by_index(const std::string& order) {
  TOKRED_CHECK(order == "index" || order == "score", kOp, ": expected order \"index\" or \"score\", got \"", order,
               "\"");
  return order == "index";
}

struct Options {
  std::string rule, metric, start;
  double lam, position_weight;
  int64_t picks_per_step;
  std::string order;
};

struct Outputs {
  Tensor kept_idx, num_kept, value;
};

using Run = void (*)(SelectDiverseArgs& args, const Tensor& x);

void run_cpu(SelectDiverseArgs& args, const Tensor&) { select_diverse_cpu(args); }
[[maybe_unused]] void run_cuda(SelectDiverseArgs& args, const Tensor& x) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(x);
  const SelectDiversePolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.x));
  const int64_t batch_size = args.batch_size, n = args.max_seqlen;
  Tensor term = new_empty(x, {batch_size, n}, ScalarType::Float);
  Tensor nearest = new_empty(x, {args.start == DiverseStart::kFarthest ? batch_size : 0, n}, ScalarType::Int);
  Tensor gram = new_empty(x, {policy.gram ? policy.group_size : 0, n, n}, ScalarType::Float);
  Tensor rows = new_empty(x, {policy.gram ? 0 : 3, batch_size, n}, ScalarType::Float);
  Tensor pick = new_empty(x, {policy.gram ? 0 : batch_size, n}, ScalarType::Int);
  args.term = static_cast<float*>(term.mutable_data_ptr());
  if (args.start == DiverseStart::kFarthest) args.nearest = static_cast<uint32_t*>(nearest.mutable_data_ptr());
  if (policy.gram) {
    args.gram = static_cast<float*>(gram.mutable_data_ptr());
  } else {
    args.rows = static_cast<float*>(rows.mutable_data_ptr());
    args.pick = static_cast<int32_t*>(pick.mutable_data_ptr());
  }
  check_cuda(kOp, select_diverse_cuda(args, device.stream()));
#endif
}

Outputs select(Run run, const Tensor& x, int64_t k, const OptTensor& weight, const OptTensor& positions,
               const OptTensor& drop_mask, const OptTensor& start_idx, const OptTensor& cu_seqlens, int64_t max_seqlen,
               const Options& options) {
  const bool packed = cu_seqlens.has_value();
  TOKRED_CHECK(x.dim() == (packed ? 2 : 3), kOp, ": expected x of shape ",
               packed ? "[total_tokens, dim] (with cu_seqlens)" : "[batch_size, num_tokens, dim]", ", got ",
               shape_of(x));
  SelectDiverseArgs args{};
  args.dtype = check_float(kOp, "x", x);
  check_last_dim(kOp, "x", x);
  const int64_t num_tokens = x.size(packed ? 0 : 1);
  check_int32_range(kOp, "num_tokens", num_tokens);
  if (packed) {
    check_cu_seqlens(kOp, *cu_seqlens, "x", x);
    TOKRED_CHECK(max_seqlen >= 0 && max_seqlen <= num_tokens, kOp, ": expected max_seqlen in [0, ", num_tokens,
                 "], got ", max_seqlen);
    TOKRED_CHECK(k >= 0, kOp, ": expected k >= 0, got ", k);
    check_int32_range(kOp, "k", k);
  } else {
    TOKRED_CHECK(k >= 0 && k <= num_tokens, kOp, ": expected k in [0, ", num_tokens, "], got ", k);
  }
  const int64_t batch_size = packed ? cu_seqlens->size(0) - 1 : x.size(0);
  const std::vector<int64_t> shape = packed ? std::vector<int64_t>{num_tokens} : std::vector{batch_size, num_tokens};
  const char* meaning = packed ? "[total_tokens]" : "[batch_size, num_tokens]";

  args.rule = parse_rule(options.rule);
  args.metric = parse_metric(options.metric);
  args.start = start_idx ? DiverseStart::kGiven : parse_start(options.start);
  args.by_index = parse_by_index(options.order);
  TOKRED_CHECK(options.lam >= 0 && options.lam <= 1, kOp, ": expected lam in [0, 1], got ", options.lam);
  TOKRED_CHECK(options.position_weight >= 0 && options.position_weight <= 1, kOp,
               ": expected position_weight in [0, 1], got ", options.position_weight);
  TOKRED_CHECK(options.picks_per_step >= 1, kOp, ": expected picks_per_step >= 1, got ", options.picks_per_step);
  args.lam = static_cast<float>(options.lam);
  args.position_weight = static_cast<float>(options.position_weight);
  args.picks_per_step = options.picks_per_step;

  TOKRED_CHECK(weight || args.rule != DiverseRule::kMmr, kOp, ": expected weight with rule \"mmr\", got none");
  TOKRED_CHECK(weight || args.start != DiverseStart::kWeight, kOp, ": expected weight with start \"weight\", got none");
  if (weight) {
    args.weight = {weight->const_data_ptr(), check_float(kOp, "weight", *weight)};
    check_same_device(kOp, "x", x, "weight", *weight);
    check_shape(kOp, "weight", *weight, shape, meaning);
    check_last_dim(kOp, "weight", *weight);
    args.stride_weight = packed ? 0 : weight->stride(0);
  }
  if (positions) {
    check_dtype(kOp, "positions", *positions, ScalarType::Float);
    check_same_device(kOp, "x", x, "positions", *positions);
    std::vector<int64_t> with_axes = shape;
    with_axes.push_back(3);
    check_shape(kOp, "positions", *positions, with_axes, packed ? "[total_tokens, 3]" : "[batch_size, num_tokens, 3]");
    check_contiguous(kOp, "positions", *positions);
    args.positions = data_or_null<float>(positions);
  }
  if (drop_mask) {
    check_dtype(kOp, "drop_mask", *drop_mask, ScalarType::Bool);
    check_same_device(kOp, "x", x, "drop_mask", *drop_mask);
    check_shape(kOp, "drop_mask", *drop_mask, shape, meaning);
    check_contiguous(kOp, "drop_mask", *drop_mask);
    args.drop_mask = data_or_null<uint8_t>(drop_mask);
  }
  if (start_idx) {
    check_same_device(kOp, "x", x, "start_idx", *start_idx);
    args.start_idx = check_index(kOp, "start_idx", *start_idx);
    check_shape(kOp, "start_idx", *start_idx, {batch_size}, "[batch_size]");
  }

  Outputs out{new_empty(x, {batch_size, k}, ScalarType::Long), new_empty(x, {batch_size}, ScalarType::Int),
              new_empty(x, {batch_size, k}, ScalarType::Float)};
  args.x = x.const_data_ptr();
  args.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  args.kept_idx = static_cast<int64_t*>(out.kept_idx.mutable_data_ptr());
  args.num_kept = static_cast<int32_t*>(out.num_kept.mutable_data_ptr());
  args.value = static_cast<float*>(out.value.mutable_data_ptr());
  args.batch_size = batch_size;
  args.num_tokens = num_tokens;
  args.max_seqlen = packed ? max_seqlen : num_tokens;
  args.dim = x.size(packed ? 1 : 2);
  args.k = k;
  args.stride_batch = packed ? 0 : x.stride(0);
  args.stride_token = x.stride(packed ? 0 : 1);
  run(args, x);
  return out;
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> plain(const Tensor& x, int64_t k, const OptTensor& weight,
                                         const OptTensor& positions, const OptTensor& drop_mask,
                                         const OptTensor& start_idx, const std::string& rule, const std::string& metric,
                                         const std::string& start, double lam, double position_weight,
                                         int64_t picks_per_step, const std::string& order) {
  const Outputs out = select(run, x, k, weight, positions, drop_mask, start_idx, std::nullopt, 0,
                             {rule, metric, start, lam, position_weight, picks_per_step, order});
  return {out.kept_idx, out.num_kept, out.value};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> packed(const Tensor& x, int64_t k, const Tensor& cu_seqlens, int64_t max_seqlen,
                                          const OptTensor& weight, const OptTensor& positions,
                                          const OptTensor& drop_mask, const OptTensor& start_idx,
                                          const std::string& rule, const std::string& metric, const std::string& start,
                                          double lam, double position_weight, int64_t picks_per_step,
                                          const std::string& order) {
  const Outputs out = select(run, x, k, weight, positions, drop_mask, start_idx, cu_seqlens, max_seqlen,
                             {rule, metric, start, lam, position_weight, picks_per_step, order});
  return {out.kept_idx, out.num_kept, out.value};
}

// Sizes: batch_size, num_tokens, dim, k, element_size; start_farthest is 1 unless given.
Plan plan_select_diverse(const PlanSizes& sizes) {
  SelectDiverseArgs a{};
  a.batch_size = sizes["batch_size"];
  a.num_tokens = a.max_seqlen = sizes["num_tokens"];
  a.dim = a.stride_token = sizes["dim"];
  a.k = sizes["k"];
  a.stride_batch = a.num_tokens * a.dim;
  a.dtype = sizes.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  a.start = sizes.get("start_farthest", 1) ? DiverseStart::kFarthest : DiverseStart::kFirst;
  const SelectDiversePolicy policy = choose_policy(a, 0);
  const int64_t per_block = kDiversePrepareThreads / 32;
  Plan plan;
  plan.launches.push_back(
      {"select_diverse_prepare_kernel", {a.batch_size * ceil_div(a.max_seqlen, per_block)}, kDiversePrepareThreads});
  for (int64_t first = 0; first < a.batch_size; first += policy.group_size) {
    const int64_t count = std::min(policy.group_size, a.batch_size - first);
    if (policy.tiles > 0) plan.launches.push_back({"select_diverse_gram_kernel", {count * policy.tiles}, 128});
    plan.launches.push_back(
        {policy.gram ? "select_diverse_pick_kernel" : "select_diverse_stream_kernel", {count}, policy.threads});
  }
  return plan;
}
TOKRED_PLAN(select_diverse, plan_select_diverse)

#define TOKRED_DIVERSE_OPTIONS                                                                                      \
  "Tensor? weight=None, Tensor? positions=None, Tensor? drop_mask=None, Tensor? start_idx=None,"                    \
  " str rule=\"max_min\", str metric=\"cosine\", str start=\"farthest\", float lam=0.5, float position_weight=0.5," \
  " SymInt picks_per_step=1, str order=\"index\") -> (Tensor kept_idx, Tensor num_kept, Tensor value)"

TOKRED_SCHEMA(m) {
  m.def("select_diverse(Tensor x, SymInt k, " TOKRED_DIVERSE_OPTIONS);
  m.def("select_diverse.packed(Tensor x, SymInt k, Tensor cu_seqlens, SymInt max_seqlen, " TOKRED_DIVERSE_OPTIONS);
}
#undef TOKRED_DIVERSE_OPTIONS
TOKRED_IMPL_CPU(m) {
  m.impl("select_diverse", TORCH_BOX(&plain<run_cpu>));
  m.impl("select_diverse.packed", TORCH_BOX(&packed<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("select_diverse", TORCH_BOX(&plain<run_cuda>));
  m.impl("select_diverse.packed", TORCH_BOX(&packed<run_cuda>));
}

}  // namespace
}  // namespace tokred
