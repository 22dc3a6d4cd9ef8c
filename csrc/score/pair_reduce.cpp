// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/pair_reduce.h"

#include "torch/glue_pair.h"

namespace tokred {
namespace {

constexpr const char* kOp = "pair_reduce";

struct NamedFunction {
  const char* name;
  PairFunction function;
};
constexpr NamedFunction kFunctions[] = {
    {"mean", PairFunction::kMean},
    {"sum", PairFunction::kSum},
    {"count_above", PairFunction::kCountAbove},
    {"softmax_mean", PairFunction::kSoftmaxMean},
    {"elu_margin", PairFunction::kEluMargin},
    {"gauss", PairFunction::kGauss},
};

PairFunction parse_function(const std::string& fn) {
  for (const NamedFunction& named : kFunctions) {
    if (fn == named.name) return named.function;
  }
  throw std::runtime_error(
      concat(kOp,
             ": expected fn \"mean\", \"sum\", \"count_above\", \"softmax_mean\", \"elu_margin\" or"
             " \"gauss\", got \"",
             fn, "\""));
}

using Run = void (*)(PairReduceArgs& args, const Tensor& x);

void run_cpu(PairReduceArgs& args, const Tensor&) { pair_reduce_cpu(args); }
[[maybe_unused]] void run_cuda(PairReduceArgs& args, const Tensor& x) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(x);
  Tensor partial = new_empty(x, {pair_reduce_partial_size(args)}, ScalarType::Double);
  args.partial = static_cast<double*>(partial.mutable_data_ptr());
  check_cuda(kOp, pair_reduce_cuda(args, device.stream()));
#endif
}

Tensor call(Run run, const Tensor& x, const Tensor& y, const Tensor* cu_x, const Tensor* cu_y, const std::string& fn,
            std::optional<double> param, const PairOptions& options) {
  PairReduceArgs args{};
  args.in = check_pair(kOp, x, y, cu_x, cu_y, options);
  args.function = parse_function(fn);
  const bool plain = args.function == PairFunction::kMean || args.function == PairFunction::kSum;
  TOKRED_CHECK(plain != param.has_value(), kOp, ": expected ", plain ? "no param" : "param", " with fn \"", fn,
               "\", got ", param ? concat(*param) : "none");
  const bool divides = args.function == PairFunction::kSoftmaxMean || args.function == PairFunction::kGauss;
  TOKRED_CHECK(!divides || *param > 0, kOp, ": expected param > 0 with fn \"", fn, "\", got ", *param);
  args.param = static_cast<float>(param.value_or(0));
  Tensor out = new_empty(x, rows_of(x), ScalarType::Float);
  args.out = static_cast<float*>(out.mutable_data_ptr());
  run(args, x);
  return out;
}

template <Run run>
Tensor plain(const Tensor& x, const Tensor& y, const OptTensor& drop_mask, const OptTensor& x_group,
             const OptTensor& y_group, const std::string& fn, std::optional<double> param, const std::string& metric,
             const std::string& group_rule, bool exclude_self) {
  return call(run, x, y, nullptr, nullptr, fn, param, {drop_mask, x_group, y_group, metric, group_rule, exclude_self});
}

template <Run run>
Tensor packed(const Tensor& x, const Tensor& y, const Tensor& cu_x, const Tensor& cu_y, const OptTensor& drop_mask,
              const OptTensor& x_group, const OptTensor& y_group, const std::string& fn, std::optional<double> param,
              const std::string& metric, const std::string& group_rule, bool exclude_self) {
  return call(run, x, y, &cu_x, &cu_y, fn, param, {drop_mask, x_group, y_group, metric, group_rule, exclude_self});
}

// Sizes: batch_size, num_x, num_y, dim, element_size.
Plan plan_pair_reduce(const PlanSizes& sizes) {
  PairReduceArgs a{};
  a.in.batch_size = sizes["batch_size"];
  a.in.num_x = sizes["num_x"];
  a.in.num_y = sizes["num_y"];
  a.in.dim = a.in.stride_x = a.in.stride_y = sizes["dim"];
  a.in.dtype = sizes.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  const PairReducePolicy policy = choose_policy(a);
  Plan plan;
  plan.launches.push_back({"pair_reduce_kernel", {policy.x_blocks * policy.num_shares}, kPairThreads});
  plan.launches.push_back(
      {"pair_reduce_finish_kernel", {ceil_div(a.in.total_x(), int64_t{kPairFinishThreads})}, kPairFinishThreads});
  return plan;
}
TOKRED_PLAN(pair_reduce, plan_pair_reduce)

#define TOKRED_PAIR_REDUCE_OPTIONS                                                                          \
  "Tensor? drop_mask=None, Tensor? x_group=None, Tensor? y_group=None, str fn=\"mean\", float? param=None," \
  " str metric=\"cosine\", str group_rule=\"same\", bool exclude_self=False) -> Tensor"

TOKRED_SCHEMA(m) {
  m.def("pair_reduce(Tensor x, Tensor y, " TOKRED_PAIR_REDUCE_OPTIONS);
  m.def("pair_reduce.packed(Tensor x, Tensor y, Tensor cu_seqlens_x, Tensor cu_seqlens_y, " TOKRED_PAIR_REDUCE_OPTIONS);
}
#undef TOKRED_PAIR_REDUCE_OPTIONS
TOKRED_IMPL_CPU(m) {
  m.impl("pair_reduce", TORCH_BOX(&plain<run_cpu>));
  m.impl("pair_reduce.packed", TORCH_BOX(&packed<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("pair_reduce", TORCH_BOX(&plain<run_cuda>));
  m.impl("pair_reduce.packed", TORCH_BOX(&packed<run_cuda>));
}

}  // namespace
}  // namespace tokred
