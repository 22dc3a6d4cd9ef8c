// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/segment_expand.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "segment_expand";

struct Call {
  SegmentExpandArgs args;
  Tensor out;
};

Call prepare(const Tensor& y, const Tensor& dst_idx) {
  TOKRED_CHECK(y.dim() == 3, "segment_expand: expected y of shape [batch_size, num_out, dim], got ", shape_of(y));
  check_last_dim(kOp, "y", y);
  TOKRED_CHECK(dst_idx.dim() == 2 && dst_idx.size(0) == y.size(0),
               "segment_expand: expected dst_idx of shape [batch_size, num_tokens] with batch_size = ", y.size(0),
               ", got ", shape_of(dst_idx));
  check_same_device(kOp, "y", y, "dst_idx", dst_idx);
  const IndexPtr dst = check_index(kOp, "dst_idx", dst_idx);
  const int64_t batch_size = y.size(0), num_tokens = dst_idx.size(1);
  check_int32_range(kOp, "num_tokens", num_tokens);

  Call call{{}, new_empty(y, {batch_size, num_tokens, y.size(2)}, y.scalar_type())};
  const auto bytes = static_cast<int64_t>(y.element_size());
  call.args.rows.src = static_cast<const char*>(y.const_data_ptr());
  call.args.rows.dst = static_cast<char*>(call.out.mutable_data_ptr());
  call.args.rows.row_bytes = y.size(2) * bytes;
  call.args.rows.src_batch = y.stride(0) * bytes;
  call.args.rows.src_token = y.stride(1) * bytes;
  call.args.dst_idx = dst;
  call.args.batch_size = batch_size;
  call.args.num_tokens = num_tokens;
  call.args.num_out = y.size(1);
  return call;
}

Tensor on_cpu(const Tensor& y, const Tensor& dst_idx) {
  const Call call = prepare(y, dst_idx);
  segment_expand_cpu(call.args);
  return call.out;
}

[[maybe_unused]] Tensor on_cuda(const Tensor& y, const Tensor& dst_idx) {
  const Call call = prepare(y, dst_idx);
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(y);
  check_cuda(kOp, segment_expand_cuda(call.args, device.stream()));
#endif
  return call.out;
}

// Sizes: batch_size, num_tokens, dim, element_size (2).
Plan plan(const PlanSizes& sizes) {
  const int64_t row_bytes = sizes["dim"] * sizes.get("element_size", 2);
  const int64_t written = sizes["batch_size"] * sizes["num_tokens"] * row_bytes;
  Plan plan;
  plan.launches.push_back({"segment_expand_kernel", {ceil_div<int64_t>(written, 16384)}, 256});
  return plan;
}
TOKRED_PLAN(segment_expand, plan)

TOKRED_SCHEMA(m) { m.def("segment_expand(Tensor y, Tensor dst_idx) -> Tensor"); }
TOKRED_IMPL_CPU(m) { m.impl("segment_expand", TORCH_BOX(&on_cpu)); }
TOKRED_IMPL_CUDA(m) { m.impl("segment_expand", TORCH_BOX(&on_cuda)); }

}  // namespace
}  // namespace tokred
