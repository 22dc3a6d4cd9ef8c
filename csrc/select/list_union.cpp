// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/list_union.h"

#include "torch/glue.h"

namespace tokred {
namespace {

struct Call {
  ListUnionArgs args;
  Tensor union_idx, num_union;
};

Call prepare(const Tensor& kept_idx, int64_t num_kv_heads, int64_t kv_len) {
  TOKRED_CHECK(kept_idx.dim() == 3, "list_union: expected kept_idx of shape [batch_size, num_q_heads, k], got ",
               shape_of(kept_idx));
  const int64_t batch_size = kept_idx.size(0), num_q_heads = kept_idx.size(1), k = kept_idx.size(2);
  TOKRED_CHECK(num_kv_heads >= 1 && num_q_heads % num_kv_heads == 0,
               "list_union: expected num_kv_heads to divide num_q_heads ", num_q_heads, ", got ", num_kv_heads);
  TOKRED_CHECK(kv_len >= 0, "list_union: expected kv_len >= 0, got ", kv_len);
  check_int32_range("list_union", "kv_len", kv_len);
  ListUnionArgs args{};
  args.kept_idx = check_index("list_union", "kept_idx", kept_idx);
  args.num_unions = batch_size * num_kv_heads;
  args.members = num_q_heads / num_kv_heads * k;
  args.size = args.members < kv_len ? args.members : kv_len;
  args.kv_len = kv_len;
  Call call{args, new_empty(kept_idx, {batch_size, num_kv_heads, args.size}, ScalarType::Long),
            new_empty(kept_idx, {batch_size, num_kv_heads}, ScalarType::Int)};
  call.args.union_idx = static_cast<int64_t*>(call.union_idx.mutable_data_ptr());
  call.args.num_union = static_cast<int32_t*>(call.num_union.mutable_data_ptr());
  return call;
}

std::tuple<Tensor, Tensor> on_cpu(const Tensor& kept_idx, int64_t num_kv_heads, int64_t kv_len) {
  Call call = prepare(kept_idx, num_kv_heads, kv_len);
  list_union_cpu(call.args);
  return {call.union_idx, call.num_union};
}

[[maybe_unused]] std::tuple<Tensor, Tensor> on_cuda(const Tensor& kept_idx, int64_t num_kv_heads, int64_t kv_len) {
  Call call = prepare(kept_idx, num_kv_heads, kv_len);
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(kept_idx);
  check_cuda("list_union", list_union_cuda(call.args, device.stream()));
#endif
  return {call.union_idx, call.num_union};
}

// Sizes: num_unions, members (entries of a group's lists together), index_size (of an entry, in bytes).
Plan plan_list_union(const PlanSizes& sizes) {
  Plan plan;
  plan.launches.push_back({"union", {sizes["num_unions"]}, kListUnionThreads});
  return plan;
}
TOKRED_PLAN(list_union, plan_list_union)

TOKRED_SCHEMA(m) {
  m.def("list_union(Tensor kept_idx, SymInt num_kv_heads, SymInt kv_len) -> (Tensor union_idx, Tensor num_union)");
}
TOKRED_IMPL_CPU(m) { m.impl("list_union", TORCH_BOX(&on_cpu)); }
TOKRED_IMPL_CUDA(m) { m.impl("list_union", TORCH_BOX(&on_cuda)); }

}  // namespace
}  // namespace tokred
