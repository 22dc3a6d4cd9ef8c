// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/segment_merge.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "segment_merge";

struct Call {
  SegmentMergeArgs args;
  Tensor merged, size_out, scratch;
};

MergeMode parse_mode(const std::string& mode) {
  if (mode == "mean") return MergeMode::kMean;
  if (mode == "sum") return MergeMode::kSum;
  TOKRED_CHECK(mode == "max", "segment_merge: expected mode \"mean\", \"sum\" or \"max\", got \"", mode, "\"");
  return MergeMode::kMax;
}

const float* check_factor(const char* name, const OptTensor& factor, const Tensor& x) {
  if (!factor) return nullptr;
  check_same_device(kOp, "x", x, name, *factor);
  check_dtype(kOp, name, *factor, ScalarType::Float);
  check_shape(kOp, name, *factor, {x.size(0), x.size(1)}, "[batch_size, num_tokens]");
  check_contiguous(kOp, name, *factor);
  return static_cast<const float*>(factor->const_data_ptr());
}

Call prepare(const Tensor& x, const Tensor& dst_idx, int64_t num_out, const OptTensor& weight, const OptTensor& size,
             const std::string& mode) {
  TOKRED_CHECK(x.dim() == 3, "segment_merge: expected x of shape [batch_size, num_tokens, dim], got ", shape_of(x));
  const DType dtype = check_float(kOp, "x", x);
  check_last_dim(kOp, "x", x);
  const int64_t batch_size = x.size(0), num_tokens = x.size(1), dim = x.size(2);
  check_same_device(kOp, "x", x, "dst_idx", dst_idx);
  check_shape(kOp, "dst_idx", dst_idx, {batch_size, num_tokens}, "[batch_size, num_tokens]");
  const IndexPtr dst = check_index(kOp, "dst_idx", dst_idx);
  TOKRED_CHECK(num_out >= 0, "segment_merge: expected num_out >= 0, got ", num_out);
  check_int32_range(kOp, "num_tokens", num_tokens);
  check_int32_range(kOp, "num_out", num_out);
  check_int32_range(kOp, "dim", dim);
  check_int32_range(kOp, "batch_size * num_out", batch_size * num_out);
  const float* weight_data = check_factor("weight", weight, x);
  const float* size_data = check_factor("size", size, x);
  const MergeMode merge_mode = parse_mode(mode);
  TOKRED_CHECK(merge_mode != MergeMode::kMax || !weight,
               "segment_merge: expected weight=None in mode \"max\", got a tensor");

  Call call{{},
            new_empty(x, {batch_size, num_out, dim}, x.scalar_type()),
            new_empty(x, {batch_size, num_out}, ScalarType::Float),
            new_empty(x, {batch_size * (num_tokens + num_out + 1)}, ScalarType::Int)};
  SegmentMergeArgs& args = call.args;
  args.x = x.const_data_ptr();
  args.dst_idx = dst;
  args.weight = weight_data;
  args.size = size_data;
  args.merged = call.merged.mutable_data_ptr();
  args.size_out = static_cast<float*>(call.size_out.mutable_data_ptr());
  args.offsets = static_cast<int32_t*>(call.scratch.mutable_data_ptr());
  args.order = args.offsets + batch_size * (num_out + 1);
  args.batch_size = batch_size;
  args.num_tokens = num_tokens;
  args.num_out = num_out;
  args.dim = dim;
  args.stride_batch = x.stride(0);
  args.stride_token = x.stride(1);
  args.dtype = dtype;
  args.mode = merge_mode;
  return call;
}

std::tuple<Tensor, Tensor> on_cpu(const Tensor& x, const Tensor& dst_idx, int64_t num_out, const OptTensor& weight,
                                  const OptTensor& size, const std::string& mode) {
  const Call call = prepare(x, dst_idx, num_out, weight, size, mode);
  segment_merge_cpu(call.args);
  return {call.merged, call.size_out};
}

[[maybe_unused]] std::tuple<Tensor, Tensor> on_cuda(const Tensor& x, const Tensor& dst_idx, int64_t num_out,
                                                    const OptTensor& weight, const OptTensor& size,
                                                    const std::string& mode) {
  const Call call = prepare(x, dst_idx, num_out, weight, size, mode);
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(x);
  check_cuda(kOp, segment_merge_cuda(call.args, device.stream()));
#endif
  return {call.merged, call.size_out};
}

// Sizes: batch_size, num_tokens, num_out, dim, element_size (2).
Plan plan(const PlanSizes& sizes) {
  SegmentMergeArgs a{};
  a.batch_size = sizes["batch_size"];
  a.num_tokens = sizes["num_tokens"];
  a.num_out = sizes["num_out"];
  a.dim = sizes["dim"];
  a.dtype = sizes.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  a.stride_token = a.dim;
  a.stride_batch = a.num_tokens * a.dim;
  const SegmentMergePolicy p = choose_policy(a, 0);
  const int64_t element = element_size(a.dtype), rows = a.batch_size * a.num_out;
  const int64_t packs = ceil_div<int64_t>(a.dim * element, p.load_bytes);
  const int64_t tasks = rows * ceil_div<int64_t>(packs, p.lanes_per_row * kMergePacks);
  PlannedLaunch sort, merge;
  sort.kernel = "sort_tokens_kernel";
  sort.grid[0] = a.batch_size * ceil_div<int64_t>(a.num_out, p.segments_per_sort);
  sort.block = p.sort_warps * 32;
  merge.kernel = "merge_rows_kernel";
  merge.grid[0] = ceil_div<int64_t>(tasks, kMergeThreads / p.lanes_per_row);
  merge.block = kMergeThreads;
  Plan plan;
  plan.launches = {sort, merge};
  return plan;
}
TOKRED_PLAN(segment_merge, plan)

TOKRED_SCHEMA(m) {
  m.def(
      "segment_merge(Tensor x, Tensor dst_idx, SymInt num_out, Tensor? weight=None, Tensor? size=None,"
      " str mode=\"mean\") -> (Tensor merged, Tensor size_out)");
}
TOKRED_IMPL_CPU(m) { m.impl("segment_merge", TORCH_BOX(&on_cpu)); }
TOKRED_IMPL_CUDA(m) { m.impl("segment_merge", TORCH_BOX(&on_cuda)); }

}  // namespace
}  // namespace tokred
