// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/static_windows.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "static_windows";
using Run = void (*)(const StaticWindowsArgs& args, const Tensor& similarity);

template <Run run>
std::tuple<Tensor, Tensor, Tensor> divide(const Tensor& similarity, const OptTensor& frame_counts, double threshold,
                                          int64_t max_window) {
  TOKRED_CHECK(similarity.dim() == 3,
               "static_windows: expected similarity of shape [batch_size, num_frames - 1, num_positions], got ",
               shape_of(similarity));
  check_dtype(kOp, "similarity", similarity, ScalarType::Float);
  check_contiguous(kOp, "similarity", similarity);
  TOKRED_CHECK(max_window >= 1, "static_windows: expected max_window >= 1, got ", max_window);
  StaticWindowsArgs args{};
  args.batch_size = similarity.size(0);
  args.num_frames = similarity.size(1) + 1;
  args.num_positions = similarity.size(2);
  TOKRED_CHECK(args.num_frames <= kMaxWindowFrames, "static_windows: expected similarity of at most ",
               kMaxWindowFrames - 1, " pairs of frames, got ", similarity.size(1));
  check_int32_range(kOp, "batch_size", args.batch_size);
  check_int32_range(kOp, "the tokens of a video", args.num_frames * args.num_positions);
  if (frame_counts) {
    check_dtype(kOp, "frame_counts", *frame_counts, ScalarType::Int);
    check_shape(kOp, "frame_counts", *frame_counts, {args.batch_size}, "[batch_size]");
    check_contiguous(kOp, "frame_counts", *frame_counts);
    check_same_device(kOp, "similarity", similarity, "frame_counts", *frame_counts);
  }
  args.similarity = static_cast<const float*>(similarity.const_data_ptr());
  args.frame_counts = data_or_null<int32_t>(frame_counts);
  args.threshold = static_cast<float>(threshold);
  args.max_window = max_window < args.num_frames ? max_window : args.num_frames;
  Tensor window_idx = new_empty(similarity, {args.batch_size, args.num_frames}, ScalarType::Long);
  Tensor is_static = new_empty(similarity, {args.batch_size, args.num_frames, args.num_positions}, ScalarType::Bool);
  Tensor num_saved = new_empty(similarity, {args.batch_size}, ScalarType::Long);
  args.window_idx = static_cast<int64_t*>(window_idx.mutable_data_ptr());
  args.is_static = static_cast<uint8_t*>(is_static.mutable_data_ptr());
  args.num_saved = static_cast<int64_t*>(num_saved.mutable_data_ptr());
  run(args, similarity);
  return {std::move(window_idx), std::move(is_static), std::move(num_saved)};
}

void run_cpu(const StaticWindowsArgs& args, const Tensor&) { static_windows_cpu(args); }
[[maybe_unused]] void run_cuda(const StaticWindowsArgs& args, const Tensor& similarity) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(similarity);
  check_cuda(kOp, static_windows_cuda(args, device.stream()));
#endif
}

// Sizes: batch_size.
Plan plan_static_windows(const PlanSizes& sizes) {
  Plan plan;
  plan.launches.push_back({"static_windows", {sizes["batch_size"]}, kStaticWindowsThreads});
  return plan;
}
TOKRED_PLAN(static_windows, plan_static_windows)

TOKRED_SCHEMA(m) {
  m.def(
      "static_windows(Tensor similarity, Tensor? frame_counts, float threshold, SymInt max_window) -> "
      "(Tensor window_idx, Tensor is_static, Tensor num_saved)");
}
TOKRED_IMPL_CPU(m) { m.impl("static_windows", TORCH_BOX(&divide<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("static_windows", TORCH_BOX(&divide<run_cuda>)); }

}  // namespace
}  // namespace tokred
