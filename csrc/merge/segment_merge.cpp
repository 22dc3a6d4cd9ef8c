// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/segment_merge.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "segment_merge";

using Tensors = std::vector<Tensor>;

struct Call {
  std::vector<SegmentMergeArgs> args;  // a tensor each; all but the first find the tokens sorted
  Tensors merged;
  Tensor size_out, scratch;
};

MergeMode parse_mode(const std::string& mode) {
  if (mode == "mean") return MergeMode::kMean;
  if (mode == "sum") return MergeMode::kSum;
  TOKRED_CHECK(mode == "max", "segment_merge: expected mode \"mean\", \"sum\" or \"max\", got \"", mode, "\"");
  return MergeMode::kMax;
}

const float* check_factor(const char* name, const OptTensor& factor, const Tensor& x, const Tensor& dst_idx) {
  if (!factor) return nullptr;
  check_same_device(kOp, "x", x, name, *factor);
  check_dtype(kOp, name, *factor, ScalarType::Float);
  check_shape(kOp, name, *factor, {dst_idx.size(0), dst_idx.size(1)}, "[batch_size, num_tokens]");
  check_contiguous(kOp, name, *factor);
  return static_cast<const float*>(factor->const_data_ptr());
}

// What all tensors of a call share: the map, factors and scratch.
SegmentMergeArgs prepare_map(Call& call, const Tensor& x, const Tensor& dst_idx, int64_t num_out,
                             const OptTensor& weight, const OptTensor& size, const OptTensor& src_idx,
                             const std::string& mode) {
  TOKRED_CHECK(x.dim() == 3, "segment_merge: expected x of shape [batch_size, num_tokens, dim], got ", shape_of(x));
  const int64_t batch_size = x.size(0);
  check_same_device(kOp, "x", x, "dst_idx", dst_idx);
  const int64_t num_tokens = src_idx && dst_idx.dim() == 2 ? dst_idx.size(1) : x.size(1);
  check_shape(kOp, "dst_idx", dst_idx, {batch_size, num_tokens}, "[batch_size, num_tokens]");
  SegmentMergeArgs args{};
  args.dst_idx = check_index(kOp, "dst_idx", dst_idx);
  if (src_idx) {
    check_same_device(kOp, "x", x, "src_idx", *src_idx);
    check_shape(kOp, "src_idx", *src_idx, {batch_size, num_tokens}, "that of dst_idx");
    args.src_idx = check_index(kOp, "src_idx", *src_idx);
  }
  TOKRED_CHECK(num_out >= 0, "segment_merge: expected num_out >= 0, got ", num_out);
  check_int32_range(kOp, "num_tokens", num_tokens);
  check_int32_range(kOp, "num_out", num_out);
  check_int32_range(kOp, "batch_size * num_out", batch_size * num_out);
  args.weight = check_factor("weight", weight, x, dst_idx);
  args.size = check_factor("size", size, x, dst_idx);
  args.mode = parse_mode(mode);
  TOKRED_CHECK(args.mode != MergeMode::kMax || !weight,
               "segment_merge: expected weight=None in mode \"max\", got a tensor");
  call.size_out = new_empty(x, {batch_size, num_out}, ScalarType::Float);
  call.scratch = new_empty(x, {batch_size * (num_tokens + num_out + 1)}, ScalarType::Int);
  args.size_out = static_cast<float*>(call.size_out.mutable_data_ptr());
  args.offsets = static_cast<int32_t*>(call.scratch.mutable_data_ptr());
  args.order = args.offsets + batch_size * (num_out + 1);
  args.batch_size = batch_size;
  args.num_tokens = num_tokens;
  args.num_out = num_out;
  args.num_sources = x.size(1);
  return args;
}

void add_tensor(Call& call, SegmentMergeArgs args, const char* name, const Tensor& x) {
  args.dtype = check_float(kOp, name, x);
  check_last_dim(kOp, name, x);
  check_int32_range(kOp, "dim", x.size(2));
  call.merged.push_back(new_empty(x, {args.batch_size, args.num_out, x.size(2)}, x.scalar_type()));
  args.x = x.const_data_ptr();
  args.merged = call.merged.back().mutable_data_ptr();
  args.dim = x.size(2);
  args.stride_batch = x.stride(0);
  args.stride_token = x.stride(1);
  args.sorted = !call.args.empty();
  call.args.push_back(args);
}

Call prepare(const Tensor& x, const Tensors& others, const Tensor& dst_idx, int64_t num_out, const OptTensor& weight,
             const OptTensor& size, const OptTensor& src_idx, const std::string& mode) {
  Call call;
  const SegmentMergeArgs args = prepare_map(call, x, dst_idx, num_out, weight, size, src_idx, mode);
  add_tensor(call, args, "x", x);
  for (size_t i = 0; i < others.size(); ++i) {
    const std::string name = concat("others[", i, "]");
    const Tensor& other = others[i];
    check_same_device(kOp, "x", x, name.c_str(), other);
    TOKRED_CHECK(other.dim() == 3 && other.size(0) == x.size(0) && other.size(1) == x.size(1),
                 "segment_merge: expected ", name, " of shape [batch_size, num_tokens, any] = [", x.size(0), ", ",
                 x.size(1), ", any], got ", shape_of(other));
    add_tensor(call, args, name.c_str(), other);
  }
  return call;
}

using Run = void (*)(const std::vector<SegmentMergeArgs>& all, const Tensor& x);

void run_cpu(const std::vector<SegmentMergeArgs>& all, const Tensor&) {
  for (const SegmentMergeArgs& args : all) segment_merge_cpu(args);
}
[[maybe_unused]] void run_cuda(const std::vector<SegmentMergeArgs>& all, const Tensor& x) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(x);
  for (const SegmentMergeArgs& args : all) check_cuda(kOp, segment_merge_cuda(args, device.stream()));
#endif
}

template <Run run>
std::tuple<Tensor, Tensor> merge_one(const Tensor& x, const Tensor& dst_idx, int64_t num_out, const OptTensor& weight,
                                     const OptTensor& size, const std::string& mode) {
  const Call call = prepare(x, {}, dst_idx, num_out, weight, size, std::nullopt, mode);
  run(call.args, x);
  return {call.merged[0], call.size_out};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensors> merge_many(const Tensor& x, const Tensors& others, const Tensor& dst_idx,
                                               int64_t num_out, const OptTensor& weight, const OptTensor& size,
                                               const OptTensor& src_idx, const std::string& mode) {
  const Call call = prepare(x, others, dst_idx, num_out, weight, size, src_idx, mode);
  run(call.args, x);
  return {call.merged[0], call.size_out, Tensors(call.merged.begin() + 1, call.merged.end())};
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
  m.def(
      "segment_merge.many(Tensor x, Tensor[] others, Tensor dst_idx, SymInt num_out, Tensor? weight=None,"
      " Tensor? size=None, Tensor? src_idx=None, str mode=\"mean\")"
      " -> (Tensor merged, Tensor size_out, Tensor[] others_merged)");
}
TOKRED_IMPL_CPU(m) {
  m.impl("segment_merge", TORCH_BOX(&merge_one<run_cpu>));
  m.impl("segment_merge.many", TORCH_BOX(&merge_many<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("segment_merge", TORCH_BOX(&merge_one<run_cuda>));
  m.impl("segment_merge.many", TORCH_BOX(&merge_many<run_cuda>));
}

}  // namespace
}  // namespace tokred
