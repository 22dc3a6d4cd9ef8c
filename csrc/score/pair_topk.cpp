// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/pair_topk.h"

#include "torch/glue_pair.h"

namespace tokred {
namespace {

constexpr const char* kOp = "pair_topk";

using Run = void (*)(PairTopkArgs& args, const Tensor& x);

void run_cpu(PairTopkArgs& args, const Tensor&) { pair_topk_cpu(args); }
[[maybe_unused]] void run_cuda(PairTopkArgs& args, const Tensor& x) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(x);
  const PairTopkPolicy policy = choose_policy(args);
  Tensor partial = new_empty(x, {pair_topk_partial_size(args, policy)}, ScalarType::Long);
  args.partial = static_cast<uint64_t*>(partial.mutable_data_ptr());
  check_cuda(kOp, pair_topk_cuda(args, device.stream()));
#endif
}

std::tuple<Tensor, Tensor> call(Run run, const Tensor& x, const Tensor& y, int64_t k, const Tensor* cu_x,
                                const Tensor* cu_y, const OptTensor& bias, const PairOptions& options) {
  PairTopkArgs args{};
  args.in = check_pair(kOp, x, y, cu_x, cu_y, options);
  TOKRED_CHECK(k >= 0 && (cu_x || k <= args.in.num_y), kOp, ": expected k ",
               cu_x ? ">= 0" : concat("in [0, ", args.in.num_y, "]"), ", got ", k);
  check_int32_range(kOp, "k", k);
  if (bias) {
    check_dtype(kOp, "bias", *bias, ScalarType::Float);
    check_same_device(kOp, "x", x, "bias", *bias);
    check_shape(kOp, "bias", *bias, rows_of(y), cu_x ? "[total_y]" : y.dim() == 2 ? "[num_y]" : "[batch_size, num_y]");
    check_contiguous(kOp, "bias", *bias);
    args.bias = data_or_null<float>(bias);
  }
  std::vector<int64_t> shape = rows_of(x);
  shape.push_back(k);
  Tensor value = new_empty(x, shape, ScalarType::Float), idx = new_empty(x, shape, ScalarType::Long);
  args.value = static_cast<float*>(value.mutable_data_ptr());
  args.idx = static_cast<int64_t*>(idx.mutable_data_ptr());
  args.k = k;
  run(args, x);
  return {value, idx};
}

template <Run run>
std::tuple<Tensor, Tensor> plain(const Tensor& x, const Tensor& y, int64_t k, const OptTensor& bias,
                                 const OptTensor& drop_mask, const OptTensor& x_group, const OptTensor& y_group,
                                 const std::string& metric, const std::string& group_rule, bool exclude_self) {
  return call(run, x, y, k, nullptr, nullptr, bias, {drop_mask, x_group, y_group, metric, group_rule, exclude_self});
}

template <Run run>
std::tuple<Tensor, Tensor> packed(const Tensor& x, const Tensor& y, int64_t k, const Tensor& cu_x, const Tensor& cu_y,
                                  const OptTensor& bias, const OptTensor& drop_mask, const OptTensor& x_group,
                                  const OptTensor& y_group, const std::string& metric, const std::string& group_rule,
                                  bool exclude_self) {
  return call(run, x, y, k, &cu_x, &cu_y, bias, {drop_mask, x_group, y_group, metric, group_rule, exclude_self});
}

// Sizes: batch_size, num_x, num_y, dim, k, element_size.
Plan plan_pair_topk(const PlanSizes& sizes) {
  PairTopkArgs a{};
  a.in.batch_size = sizes["batch_size"];
  a.in.num_x = sizes["num_x"];
  a.in.num_y = sizes["num_y"];
  a.in.dim = a.in.stride_x = a.in.stride_y = sizes["dim"];
  a.k = sizes["k"];
  a.in.dtype = sizes.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  const PairTopkPolicy policy = choose_policy(a);
  const int64_t rows = kPairMergeThreads / 32 / policy.merge_warps;
  Plan plan;
  for (int pass = 0; pass < policy.passes; ++pass) {
    plan.launches.push_back({"pair_topk_kernel", {policy.x_blocks * policy.num_splits}, kPairThreads});
    plan.launches.push_back({"pair_topk_merge_kernel", {ceil_div(a.in.total_x(), rows)}, kPairMergeThreads});
  }
  return plan;
}
TOKRED_PLAN(pair_topk, plan_pair_topk)

#define TOKRED_PAIR_TOPK_OPTIONS                                                           \
  "Tensor? bias=None, Tensor? drop_mask=None, Tensor? x_group=None, Tensor? y_group=None," \
  " str metric=\"cosine\", str group_rule=\"same\", bool exclude_self=False) -> (Tensor value, Tensor idx)"

TOKRED_SCHEMA(m) {
  m.def("pair_topk(Tensor x, Tensor y, SymInt k, " TOKRED_PAIR_TOPK_OPTIONS);
  m.def(
      "pair_topk.packed(Tensor x, Tensor y, SymInt k, Tensor cu_seqlens_x, Tensor cu_seqlens_y,"
      " " TOKRED_PAIR_TOPK_OPTIONS);
}
#undef TOKRED_PAIR_TOPK_OPTIONS
TOKRED_IMPL_CPU(m) {
  m.impl("pair_topk", TORCH_BOX(&plain<run_cpu>));
  m.impl("pair_topk.packed", TORCH_BOX(&packed<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("pair_topk", TORCH_BOX(&plain<run_cuda>));
  m.impl("pair_topk.packed", TORCH_BOX(&packed<run_cuda>));
}

}  // namespace
}  // namespace tokred
