// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/run_markers.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "run_markers";
using Run = void (*)(const RunMarkersArgs& args, const Tensor& keep);

template <Run run>
std::tuple<Tensor, Tensor, Tensor> mark(const Tensor& keep, const OptTensor& cu_seqlens) {
  const bool packed = cu_seqlens.has_value();
  TOKRED_CHECK(keep.dim() == (packed ? 1 : 2), "run_markers: expected keep of shape ",
               packed ? "[total_tokens] (with cu_seqlens)" : "[batch_size, num_tokens]", ", got ", shape_of(keep));
  check_dtype(kOp, "keep", keep, ScalarType::Bool);
  check_contiguous(kOp, "keep", keep);
  check_int32_range(kOp, "the tokens of keep", keep.numel());
  if (packed) check_cu_seqlens(kOp, *cu_seqlens, "keep", keep);
  RunMarkersArgs args{};
  args.keep = static_cast<const uint8_t*>(keep.const_data_ptr());
  args.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  args.batch_size = packed ? cu_seqlens->size(0) - 1 : keep.size(0);
  args.num_tokens = packed ? 0 : keep.size(1);
  args.total_tokens = keep.numel();
  check_int32_range(kOp, "batch_size", args.batch_size);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < keep.dim(); ++d) shape.push_back(keep.size(d));
  Tensor kept_or_marker = new_empty(keep, shape), marker = new_empty(keep, shape);
  Tensor num_runs = new_empty(keep, {args.batch_size}, ScalarType::Int);
  args.kept_or_marker = static_cast<uint8_t*>(kept_or_marker.mutable_data_ptr());
  args.marker = static_cast<uint8_t*>(marker.mutable_data_ptr());
  args.num_runs = static_cast<int32_t*>(num_runs.mutable_data_ptr());
  run(args, keep);
  return {std::move(kept_or_marker), std::move(marker), std::move(num_runs)};
}

void run_cpu(const RunMarkersArgs& args, const Tensor&) { run_markers_cpu(args); }
[[maybe_unused]] void run_cuda(const RunMarkersArgs& args, const Tensor& keep) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(keep);
  check_cuda(kOp, run_markers_cuda(args, device.stream()));
#endif
}

// Sizes: batch_size, num_tokens.
Plan plan_run_markers(const PlanSizes& sizes) {
  Plan plan;
  plan.launches.push_back(
      {"run_markers", {sizes["batch_size"] + ceil_div<int64_t>(sizes["batch_size"] * sizes["num_tokens"], 2048)}, 512});
  return plan;
}
TOKRED_PLAN(run_markers, plan_run_markers)

TOKRED_SCHEMA(m) {
  m.def("run_markers(Tensor keep, Tensor? cu_seqlens=None) -> (Tensor kept_or_marker, Tensor marker, Tensor num_runs)");
}
TOKRED_IMPL_CPU(m) { m.impl("run_markers", TORCH_BOX(&mark<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("run_markers", TORCH_BOX(&mark<run_cuda>)); }

}  // namespace
}  // namespace tokred
