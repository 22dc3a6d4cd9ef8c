// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/attn_received.h"

#include <cmath>

#include "torch/glue.h"

namespace tokred {
namespace {

struct Call {
  AttnReceivedArgs args;
  Tensor received, lse, partial;
};

AttnReceivedStrides strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// lse and q_weight: float32 [batch_size, num_q_heads, q_len].
const float* check_rows(const char* name, const OptTensor& x, const Tensor& q, AttnReceivedStrides& stride) {
  if (!x) return nullptr;
  check_dtype("attn_received", name, *x, ScalarType::Float);
  check_same_device("attn_received", "q", q, name, *x);
  check_shape("attn_received", name, *x, {q.size(0), q.size(1), q.size(2)}, "[batch_size, num_q_heads, q_len]");
  check_last_dim("attn_received", name, *x);
  stride = strides(*x);
  return static_cast<const float*>(x->const_data_ptr());
}

AttnReceivedArgs check(const Tensor& q, const Tensor& k, const OptTensor& lse, const OptTensor& q_weight, bool causal,
                       std::optional<int64_t> q_start, const std::string& reduce, std::optional<double> scale) {
  AttnReceivedArgs a{};
  TOKRED_CHECK(q.dim() == 4, "attn_received: expected q of shape [batch_size, num_q_heads, q_len, head_dim], got ",
               shape_of(q));
  TOKRED_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3),
               "attn_received: expected k of shape [batch_size, num_kv_heads, kv_len, head_dim] with the batch_size and"
               " head_dim of q ",
               shape_of(q), ", got ", shape_of(k));
  TOKRED_CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0,
               "attn_received: expected num_q_heads to be a multiple of num_kv_heads, got ", q.size(1), " and ",
               k.size(1));
  TOKRED_CHECK(q.size(3) >= 1 && q.size(3) <= kAttnReceivedMaxHeadDim, "attn_received: expected head_dim in [1, ",
               kAttnReceivedMaxHeadDim, "], got ", q.size(3));
  a.dtype = check_float("attn_received", "q", q);
  TOKRED_CHECK(k.scalar_type() == q.scalar_type(), "attn_received: expected k of q's dtype ", dtype_of(q), ", got ",
               dtype_of(k));
  check_same_device("attn_received", "q", q, "k", k);
  check_last_dim("attn_received", "q", q);
  check_last_dim("attn_received", "k", k);
  check_int32_range("attn_received", "q_len", q.size(2));
  check_int32_range("attn_received", "kv_len", k.size(2));
  if (k.size(1) > 0)
    check_int32_range("attn_received", "q_len times heads per group", q.size(2) * (q.size(1) / k.size(1)));
  TOKRED_CHECK(reduce == "sum" || reduce == "max", "attn_received: expected reduce to be \"sum\" or \"max\", got \"",
               reduce, "\"");
  a.scale = static_cast<float>(scale ? *scale : 1 / std::sqrt(static_cast<double>(q.size(3))));
  TOKRED_CHECK(a.scale > 0 && std::isfinite(a.scale), "attn_received: expected scale > 0 and finite, got ", *scale);
  a.lse_in = check_rows("lse", lse, q, a.stride_lse_in);
  a.q_weight = check_rows("q_weight", q_weight, q, a.stride_weight);
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.stride_q = strides(q);
  a.stride_k = strides(k);
  a.batch_size = q.size(0);
  a.num_q_heads = q.size(1);
  a.num_kv_heads = k.size(1);
  a.q_len = q.size(2);
  a.kv_len = k.size(2);
  a.head_dim = q.size(3);
  a.q_start = q_start ? *q_start : a.kv_len - a.q_len;
  // Kernels hold positions in an int32: beyond these bounds every query sees all keys, or none.
  a.q_start = std::max<int64_t>(-(int64_t{1} << 31) + 1024, std::min<int64_t>(a.q_start, (int64_t{1} << 31) - 1024));
  TOKRED_CHECK(!q_start || !causal || a.q_start == *q_start,
               "attn_received: expected q_start within 2^31 - 1024 of zero, got ", *q_start);
  a.causal = causal;
  a.max_reduce = reduce == "max";
  return a;
}

void run_cpu(Call& call, const Tensor&) { attn_received_cpu(call.args); }
[[maybe_unused]] void run_cuda(Call& call, const Tensor& q) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  AttnReceivedArgs& a = call.args;
  const OnDevice device(q);
  const auto policy = choose_attn_received_policy(a.rows(), a.kv_len, a.head_dim, a.dtype);
  if (!a.lse_in && policy.num_splits > 1) {
    call.partial = new_empty(q, {a.batch_size, a.num_kv_heads, policy.num_splits, a.rows(), 2}, ScalarType::Float);
    a.partial = static_cast<float*>(call.partial.mutable_data_ptr());
  }
  check_cuda("attn_received", attn_received_cuda(a, device.stream()));
#endif
}

template <void (*run)(Call&, const Tensor&)>
std::tuple<Tensor, Tensor> op(const Tensor& q, const Tensor& k, const OptTensor& lse, const OptTensor& q_weight,
                              bool causal, std::optional<int64_t> q_start, std::string reduce,
                              std::optional<double> scale) {
  Call call;
  call.args = check(q, k, lse, q_weight, causal, q_start, reduce, scale);
  AttnReceivedArgs& a = call.args;
  call.received = new_empty(q, {a.batch_size, a.num_q_heads, a.kv_len}, ScalarType::Float);
  call.lse = new_empty(q, {a.batch_size, a.num_q_heads, a.q_len}, ScalarType::Float);
  a.received = static_cast<float*>(call.received.mutable_data_ptr());
  a.lse = static_cast<float*>(call.lse.mutable_data_ptr());
  run(call, q);
  return {call.received, call.lse};
}

Plan plan(const PlanSizes& sizes) {
  const int64_t batch = sizes.get("batch_size", 1), kv_heads = sizes["num_kv_heads"], q_heads = sizes["num_q_heads"];
  const int64_t q_len = sizes["q_len"], kv_len = sizes["kv_len"], head_dim = sizes["head_dim"];
  const int64_t bytes = sizes.get("element_size", 2), rows = q_heads / kv_heads * q_len;
  const bool lse_given = sizes.get("lse", 0) != 0;
  const auto policy = choose_attn_received_policy(rows, kv_len, head_dim, bytes == 4 ? DType::kF32 : DType::kBF16);
  Plan plan;
  const auto add = [&](const char* name, int64_t blocks, int64_t threads) {
    PlannedLaunch launch;
    launch.kernel = name;
    launch.grid[0] = blocks;
    launch.block = threads;
    plan.launches.push_back(launch);
  };
  const int64_t heads = batch * kv_heads;
  if (lse_given) {
    add("copy_lse", ceil_div<int64_t>(heads * rows, 256), 256);
  } else {
    const int64_t row_blocks = ceil_div<int64_t>(rows, policy.warps_lse * policy.rows_per_warp);
    add("attn_lse", heads * row_blocks * policy.num_splits, policy.warps_lse * 32);
    if (policy.num_splits > 1) add("combine_lse", ceil_div<int64_t>(heads * rows, 8), 256);
  }
  add("attn_received", heads * ceil_div<int64_t>(kv_len, policy.warps_received * policy.rows_per_warp),
      policy.warps_received * 32);
  return plan;
}
TOKRED_PLAN(attn_received, plan)

TOKRED_SCHEMA(m) {
  m.def(
      "attn_received(Tensor q, Tensor k, Tensor? lse=None, Tensor? q_weight=None, bool causal=False,"
      " SymInt? q_start=None, str reduce=\"sum\", float? scale=None) -> (Tensor received, Tensor lse)");
}
TOKRED_IMPL_CPU(m) { m.impl("attn_received", TORCH_BOX(&op<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("attn_received", TORCH_BOX(&op<run_cuda>)); }

}  // namespace
}  // namespace tokred
