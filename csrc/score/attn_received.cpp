// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/attn_received.h"

#include <cmath>

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "attn_received";

struct Call {
  AttnReceivedArgs args;
  Tensor received, lse, partial;
};

AttnReceivedStrides strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// lse and q_weight: float32 [batch_size, num_q_heads, q_len].
const float* check_rows(const char* name, const OptTensor& x, const Tensor& q, AttnReceivedStrides& stride) {
  if (!x) return nullptr;
  check_dtype(kOp, name, *x, ScalarType::Float);
  check_same_device(kOp, "q", q, name, *x);
  check_shape(kOp, name, *x, {q.size(0), q.size(1), q.size(2)}, "[batch_size, num_q_heads, q_len]");
  check_last_dim(kOp, name, *x);
  stride = strides(*x);
  return static_cast<const float*>(x->const_data_ptr());
}

struct Options {
  const OptTensor &lse, &q_weight;
  bool causal;
  std::optional<int64_t> q_start;
  const std::string& reduce;
  std::optional<double> scale;
  std::optional<int64_t> window;
  std::optional<double> softcap;
  const OptTensor &sink, &key_bias;
};

// One bias for all heads, one per key head, or one per query head: then each query head is a group of its own.
void check_key_bias(const Tensor& q, const Tensor& bias, AttnReceivedArgs& a) {
  check_dtype(kOp, "key_bias", bias, ScalarType::Float);
  check_same_device(kOp, "q", q, "key_bias", bias);
  TOKRED_CHECK(bias.dim() == 3 && bias.size(0) == a.batch_size && bias.size(2) == a.kv_len,
               "attn_received: expected key_bias of shape [batch_size, heads, kv_len] with batch_size ", a.batch_size,
               " and kv_len ", a.kv_len, ", got ", shape_of(bias));
  const int64_t heads = bias.size(1);
  TOKRED_CHECK(heads == a.num_q_heads || heads == a.num_kv_heads || heads == 1,
               "attn_received: expected key_bias with ", a.num_q_heads, " (query heads), ", a.num_kv_heads,
               " (kv heads) or 1 heads, got ", shape_of(bias));
  check_last_dim(kOp, "key_bias", bias);
  a.key_bias = static_cast<const float*>(bias.const_data_ptr());
  a.bias_batch = bias.stride(0);
  a.bias_head = heads == 1 ? 0 : bias.stride(1);
  if (heads != a.num_q_heads || heads == 1) return;
  a.k_repeat = a.group();
  a.num_kv_heads = a.num_q_heads;
}

void check_options(const Tensor& q, const Options& o, AttnReceivedArgs& a) {
  TOKRED_CHECK(o.reduce == "sum" || o.reduce == "max",
               "attn_received: expected reduce to be \"sum\" or \"max\", got \"", o.reduce, "\"");
  a.max_reduce = o.reduce == "max";
  a.scale = static_cast<float>(o.scale ? *o.scale : 1 / std::sqrt(static_cast<double>(a.head_dim)));
  TOKRED_CHECK(a.scale > 0 && std::isfinite(a.scale), "attn_received: expected scale > 0 and finite, got ", *o.scale);
  a.softcap = static_cast<float>(o.softcap ? *o.softcap : 0);
  TOKRED_CHECK(!o.softcap || (a.softcap > 0 && std::isfinite(a.softcap)),
               "attn_received: expected softcap > 0 and finite, got ", *o.softcap);
  TOKRED_CHECK(!o.window || *o.window >= 0, "attn_received: expected window >= 0, got ", *o.window);
  a.lse_in = check_rows("lse", o.lse, q, a.stride_lse_in);
  a.q_weight = check_rows("q_weight", o.q_weight, q, a.stride_weight);
  if (o.sink) {
    TOKRED_CHECK(!o.lse, "attn_received: expected sink or lse, not both: a given lse is the whole denominator");
    check_dtype(kOp, "sink", *o.sink, ScalarType::Float);
    check_shape(kOp, "sink", *o.sink, {a.num_q_heads}, "[num_q_heads]");
    check_contiguous(kOp, "sink", *o.sink);
    check_same_device(kOp, "q", q, "sink", *o.sink);
    a.sink = static_cast<const float*>(o.sink->const_data_ptr());
  }
  if (o.key_bias) check_key_bias(q, *o.key_bias, a);
  constexpr int64_t kFar = int64_t{1} << 40;  // beyond every key
  const int64_t start = o.q_start ? *o.q_start : a.kv_len - a.q_len, back = o.window ? std::min(*o.window, kFar) : kFar;
  a.band = make_band(std::max(-kFar, std::min(start, kFar)), back, o.causal ? 0 : back, a.q_len, a.kv_len);
  a.exponent_scale = a.adjusted() ? 1.f : a.scale * kLog2e;
}

AttnReceivedArgs check(const Tensor& q, const Tensor& k, const Options& options) {
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
  a.dtype = check_float(kOp, "q", q);
  TOKRED_CHECK(k.scalar_type() == q.scalar_type(), "attn_received: expected k of q's dtype ", dtype_of(q), ", got ",
               dtype_of(k));
  check_same_device(kOp, "q", q, "k", k);
  check_last_dim(kOp, "q", q);
  check_last_dim(kOp, "k", k);
  check_int32_range(kOp, "q_len + kv_len", q.size(2) + k.size(2));
  if (k.size(1) > 0) check_int32_range(kOp, "q_len times heads per group", q.size(2) * (q.size(1) / k.size(1)));
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.stride_q = strides(q);
  a.stride_k = strides(k);
  a.batch_size = q.size(0);
  a.num_q_heads = q.size(1);
  a.num_kv_heads = k.size(1);
  a.k_repeat = 1;
  a.q_len = q.size(2);
  a.kv_len = k.size(2);
  a.head_dim = q.size(3);
  check_options(q, options, a);
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
                              std::optional<double> scale, std::optional<int64_t> window, std::optional<double> softcap,
                              const OptTensor& sink, const OptTensor& key_bias) {
  Call call;
  call.args = check(q, k, {lse, q_weight, causal, q_start, reduce, scale, window, softcap, sink, key_bias});
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
      " SymInt? q_start=None, str reduce=\"sum\", float? scale=None, SymInt? window=None, float? softcap=None,"
      " Tensor? sink=None, Tensor? key_bias=None) -> (Tensor received, Tensor lse)");
}
TOKRED_IMPL_CPU(m) { m.impl("attn_received", TORCH_BOX(&op<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("attn_received", TORCH_BOX(&op<run_cuda>)); }

}  // namespace
}  // namespace tokred
