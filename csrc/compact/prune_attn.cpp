// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/prune_attn.h"

#include <cmath>

#include "torch/glue_prune.h"

namespace tokred {
namespace {

constexpr const char* kOp = "prune_attn";

struct Options {
  const OptTensor& key_bias;
  std::optional<double> scale;
  const std::string& reduce;
  int64_t first_key;
  const OptTensor& cu_seqlens_k;
};

struct Call {
  PruneAttnArgs args;
  PruneCall prune;
  Tensor score;
};

void check_queries(const Tensor& x, const Tensor& q, const Tensor& k, bool packed, PruneAttnArgs& a) {
  const int64_t batch_size = a.prune.rows.num_rows;
  TOKRED_CHECK(q.dim() == 4 && q.size(0) == batch_size && q.size(2) == 1,
               "prune_attn: expected q of shape [batch_size, num_q_heads, 1, head_dim] with batch_size ", batch_size,
               ", got ", shape_of(q));
  TOKRED_CHECK(packed ? k.dim() == 3 : k.dim() == 4 && k.size(0) == batch_size, "prune_attn: expected k of shape ",
               packed ? "[total_tokens, num_kv_heads, head_dim] (with cu_seqlens)"
                      : concat("[batch_size, num_kv_heads, kv_len, head_dim] with batch_size ", batch_size),
               ", got ", shape_of(k));
  QkRows& rows = a.qk;
  rows.dtype = check_float(kOp, "q", q);
  TOKRED_CHECK(k.scalar_type() == q.scalar_type(), "prune_attn: expected k of the dtype of q (", dtype_of(q), "), got ",
               dtype_of(k));
  const int64_t head_dim = q.size(3), k_head_dim = k.size(k.dim() - 1);
  TOKRED_CHECK(head_dim >= 1 && head_dim <= kQkRowsMaxHeadDim, "prune_attn: expected q with head_dim in [1, ",
               kQkRowsMaxHeadDim, "], got ", head_dim);
  TOKRED_CHECK(k_head_dim == head_dim, "prune_attn: expected k with the head_dim ", head_dim, " of q, got ",
               shape_of(k));
  check_same_device(kOp, "x", x, "q", q);
  check_same_device(kOp, "x", x, "k", k);
  check_last_dim(kOp, "q", q);
  check_last_dim(kOp, "k", k);
  rows.q = q.const_data_ptr();
  rows.k.data = k.const_data_ptr();
  rows.k.dim = head_dim;
  rows.k.stride_batch = packed ? 0 : k.stride(0);
  rows.k.stride_head = k.stride(1);
  rows.k.stride_token = packed ? k.stride(0) : k.stride(2);
  rows.batch_size = batch_size;
  rows.num_q_heads = q.size(1);
  rows.num_kv_heads = k.size(1);
  TOKRED_CHECK(rows.num_kv_heads > 0 && rows.num_q_heads > 0 && rows.num_q_heads % rows.num_kv_heads == 0,
               "prune_attn: expected num_q_heads to be a multiple of num_kv_heads, got ", rows.num_q_heads, " and ",
               rows.num_kv_heads);
  rows.q_len = 1;
  rows.num_keys = k.size(packed ? 0 : 2);
  rows.kv_len = rows.num_keys;
  rows.q_batch = q.stride(0);
  rows.q_head = q.stride(1);
  check_int32_range(kOp, "kv_len", rows.num_keys);
}

// One bias for all heads, one per key head, or one per query head.
void check_bias(const Tensor& x, const Tensor& bias, bool packed, PruneAttnArgs& a) {
  const QkRows& rows = a.qk;
  check_dtype(kOp, "key_bias", bias, ScalarType::Float);
  check_same_device(kOp, "x", x, "key_bias", bias);
  const int64_t head_dim = packed ? 0 : 1;
  TOKRED_CHECK(
      bias.dim() == head_dim + 2 && (packed || bias.size(0) == rows.batch_size) &&
          bias.size(head_dim + 1) == rows.num_keys,
      "prune_attn: expected key_bias of shape ",
      packed ? concat("[heads, total_k] with total_k ", rows.num_keys)
             : concat("[batch_size, heads, kv_len] with batch_size ", rows.batch_size, " and kv_len ", rows.num_keys),
      ", got ", shape_of(bias));
  const int64_t heads = bias.size(head_dim);
  TOKRED_CHECK(heads == rows.num_q_heads || heads == rows.num_kv_heads || heads == 1,
               "prune_attn: expected key_bias with ", rows.num_q_heads, " (query heads), ", rows.num_kv_heads,
               " (kv heads) or 1 heads, got ", shape_of(bias));
  check_last_dim(kOp, "key_bias", bias);
  a.key_bias = static_cast<const float*>(bias.const_data_ptr());
  a.bias_batch = packed ? 0 : bias.stride(0);
  a.bias_head = bias.stride(head_dim);
  a.bias_repeat = static_cast<int>(rows.num_q_heads / heads);
}

void check_options(const Tensor& x, const Options& o, PruneAttnArgs& a) {
  const bool packed = a.prune.rows.cu_seqlens;
  TOKRED_CHECK(o.reduce == "mean" || o.reduce == "sum" || o.reduce == "max",
               "prune_attn: expected reduce to be \"mean\", \"sum\" or \"max\", got \"", o.reduce, "\"");
  a.reduce = o.reduce == "mean" ? HeadReduce::kMean : o.reduce == "sum" ? HeadReduce::kSum : HeadReduce::kMax;
  a.qk.scale = static_cast<float>(o.scale ? *o.scale : 1 / std::sqrt(static_cast<double>(a.qk.k.dim)));
  TOKRED_CHECK(std::isfinite(a.qk.scale), "prune_attn: expected a finite scale, got ", *o.scale);
  const int64_t num_tokens = a.prune.rows.num_tokens;
  TOKRED_CHECK(o.first_key >= 0, "prune_attn: expected first_key >= 0, got ", o.first_key);
  if (!packed) {
    TOKRED_CHECK(o.first_key <= a.qk.num_keys - num_tokens, "prune_attn: expected k with first_key + num_tokens (",
                 o.first_key, " + ", num_tokens, ") keys or more, got ", a.qk.num_keys);
  } else if (o.cu_seqlens_k) {
    check_dtype(kOp, "cu_seqlens_k", *o.cu_seqlens_k, ScalarType::Int);
    check_shape(kOp, "cu_seqlens_k", *o.cu_seqlens_k, {a.prune.rows.num_rows + 1}, "[batch_size + 1]");
    check_contiguous(kOp, "cu_seqlens_k", *o.cu_seqlens_k);
    check_same_device(kOp, "x", x, "cu_seqlens_k", *o.cu_seqlens_k);
    a.qk.cu_seqlens = static_cast<const int32_t*>(o.cu_seqlens_k->const_data_ptr());
  } else {
    TOKRED_CHECK(a.qk.num_keys == num_tokens && o.first_key == 0,
                 "prune_attn: expected cu_seqlens_k, or as many keys as tokens and first_key 0, got ", a.qk.num_keys,
                 " keys, ", num_tokens, " tokens and first_key ", o.first_key);
    a.qk.cu_seqlens = a.prune.rows.cu_seqlens;
  }
  a.first_key = o.first_key;
  if (o.key_bias) check_bias(x, *o.key_bias, packed, a);
}

Call prepare(const Tensor& x, const Tensor& q, const Tensor& k, PruneOptions prune, const Options& options) {
  const bool packed = prune.cu_seqlens.has_value();
  // Of a sequence's tokens and of its keys.
  const int64_t longest = prune.max_seqlen;
  const int64_t most = packed && x.dim() > 0 && k.dim() > 0 ? std::max(x.size(0), k.size(0)) : longest;
  TOKRED_CHECK(!packed || (longest >= 0 && longest <= most), "prune_attn: expected max_seqlen in [0, ", most, "], got ",
               longest);
  if (packed && x.dim() > 0) prune.max_seqlen = std::min(longest, x.size(0));
  Call call{{}, check_prune(x, prune), {}};
  PruneAttnArgs& a = call.args;
  a.prune.rows = call.prune.rows;
  for (const RowTensor& tensor : call.prune.tensors) a.prune.tensors[a.prune.num_tensors++] = tensor;
  check_queries(x, q, k, packed, a);
  check_options(x, options, a);
  if (packed) a.qk.kv_len = std::min(longest, a.qk.num_keys);
  call.score = new_empty(x, prune_score_shape(call.prune), ScalarType::Float);
  a.score = static_cast<float*>(call.score.mutable_data_ptr());
  TopkRows& rows = a.prune.rows;
  rows.score = a.score;
  rows.dtype = DType::kF32;
  if (!packed) rows.score_stride.batch = rows.num_tokens;
  return call;
}

using Run = void (*)(PruneAttnArgs& args, const Tensor& x);

// Scratch that the caller keeps until the call is made.
template <typename T>
Tensor scratch(const Tensor& x, int64_t count, ScalarType dtype, T*& data) {
  Tensor memory = new_empty(x, {count}, dtype);
  data = static_cast<T*>(memory.mutable_data_ptr());
  return memory;
}

void run_cpu(PruneAttnArgs& a, const Tensor& x) {
  const Tensor logits = scratch(x, prune_attn_logits(a), ScalarType::Float, a.qk.out);
  prune_attn_cpu(a);
}
[[maybe_unused]] void run_cuda(PruneAttnArgs& a, const Tensor& x) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(x);
  const PruneAttnPolicy policy = choose_policy(a);
  const PruneTopkPolicy prune = choose_policy(a.prune.rows.max_seqlen, a.prune.rows.k);
  const Tensor logits = scratch(x, policy.one_launch ? 0 : prune_attn_logits(a), ScalarType::Float, a.qk.out);
  const Tensor normalizer =
      scratch(x, policy.in_block ? 0 : prune_attn_normalizers(a), ScalarType::Float, a.normalizer);
  const int64_t words = prune.fused ? 0 : topk_workspace_words(prune.select, a.prune.rows.num_rows);
  const Tensor workspace = scratch(x, words, ScalarType::Int, a.prune.rows.workspace);
  check_cuda(kOp, prune_attn_cuda(a, device.stream()));
#endif
}

template <Run run>
std::tuple<Tensor, Tensor> plain(const Tensor& x, const Tensor& q, const Tensor& k, int64_t num_keep,
                                 const OptTensor& keep_mask, const OptTensor& drop_mask, const OptTensor& key_bias,
                                 std::optional<double> scale, std::string reduce, int64_t first_key, int64_t keep_first,
                                 int64_t keep_last) {
  Call call = prepare(x, q, k,
                      {kOp,
                       "num_keep",
                       num_keep,
                       keep_mask,
                       drop_mask,
                       std::nullopt,
                       0,
                       {},
                       keep_first,
                       keep_last,
                       kPruneTopkMaxTensors},
                      {key_bias, scale, reduce, first_key, std::nullopt});
  run(call.args, x);
  return {call.prune.kept[0], call.prune.kept_idx};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> packed(
    const Tensor& x, const Tensor& q, const Tensor& k, int64_t num_keep, const OptTensor& keep_mask,
    const OptTensor& drop_mask, const OptTensor& key_bias, std::optional<double> scale, std::string reduce,
    int64_t first_key, int64_t keep_first, int64_t keep_last, const OptTensor& cu_seqlens,
    const OptTensor& cu_seqlens_k, int64_t max_seqlen, const std::optional<std::vector<Tensor>>& others) {
  TOKRED_CHECK(cu_seqlens || !cu_seqlens_k, "prune_attn: expected cu_seqlens with cu_seqlens_k");
  const std::vector<Tensor> companions = others ? *others : std::vector<Tensor>{};
  Call call = prepare(x, q, k,
                      {kOp, "num_keep", num_keep, keep_mask, drop_mask, cu_seqlens, max_seqlen, companions, keep_first,
                       keep_last, kPruneTopkMaxTensors},
                      {key_bias, scale, reduce, first_key, cu_seqlens_k});
  Tensor num_kept = new_empty(x, {call.args.prune.rows.num_rows}, ScalarType::Int);
  call.args.prune.rows.num_kept = static_cast<int32_t*>(num_kept.mutable_data_ptr());
  run(call.args, x);
  const std::vector<Tensor>& kept = call.prune.kept;
  return {kept[0], call.prune.kept_idx, num_kept, call.score, {kept.begin() + 1, kept.end()}};
}

// Sizes: batch_size, num_tokens, dim, num_keep, num_q_heads, num_kv_heads, head_dim, element_size.
Plan plan_of_sizes(const PlanSizes& sizes) {
  PruneAttnArgs a{};
  TopkRows& rows = a.prune.rows;
  rows.num_rows = a.qk.batch_size = sizes["batch_size"];
  rows.num_tokens = rows.max_seqlen = sizes["num_tokens"];
  rows.k = sizes["num_keep"];
  a.qk.kv_len = sizes.get("kv_len", rows.num_tokens);
  a.qk.num_q_heads = sizes["num_q_heads"];
  a.qk.num_kv_heads = sizes["num_kv_heads"];
  a.qk.q_len = 1;
  a.qk.k.dim = sizes["head_dim"];
  a.qk.dtype = sizes.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  a.prune.tensors[0].row_bytes = sizes["dim"] * element_size(a.qk.dtype);
  const PruneAttnPolicy policy = choose_policy(a);
  Plan plan;
  if (policy.one_launch) {
    plan.launches.push_back({"score_select_and_copy", {rows.num_rows}, kPruneAttnThreads});
    return plan;
  }
  plan.launches.push_back({"logits", {num_blocks(a.qk, choose_qk_policy(a.qk))}, kQkRowsThreads});
  const PruneTopkPolicy prune = choose_policy(rows.max_seqlen, rows.k);
  if (policy.in_block) {
    plan.launches.push_back({"score_select_and_copy", {rows.num_rows * prune_attn_splits(a)}, prune.threads});
    return plan;
  }
  plan.launches.push_back({"sum", {rows.num_rows * a.qk.num_q_heads}, kPruneAttnThreads});
  plan.launches.push_back(
      {"score", {rows.num_rows * ceil_div<int64_t>(rows.max_seqlen, kPruneAttnThreads)}, kPruneAttnThreads});
  plan_prune_topk(plan, rows.num_rows, rows.max_seqlen, rows.k, a.prune.tensors[0].row_bytes);
  return plan;
}
TOKRED_PLAN(prune_attn, plan_of_sizes)

#define TOKRED_PRUNE_ATTN                                                                                    \
  "Tensor x, Tensor q, Tensor k, SymInt num_keep, Tensor? keep_mask=None, Tensor? drop_mask=None,"           \
  " Tensor? key_bias=None, float? scale=None, str reduce=\"mean\", SymInt first_key=0, SymInt keep_first=0," \
  " SymInt keep_last=0"
TOKRED_SCHEMA(m) {
  m.def("prune_attn(" TOKRED_PRUNE_ATTN ") -> (Tensor x_kept, Tensor kept_idx)");
  m.def("prune_attn.packed(" TOKRED_PRUNE_ATTN
        ", Tensor? cu_seqlens=None, Tensor? cu_seqlens_k=None, SymInt max_seqlen=0, Tensor[]? others=None)"
        " -> (Tensor x_kept, Tensor kept_idx, Tensor num_kept, Tensor score, Tensor[] others_kept)");
}
TOKRED_IMPL_CPU(m) {
  m.impl("prune_attn", TORCH_BOX(&plain<run_cpu>));
  m.impl("prune_attn.packed", TORCH_BOX(&packed<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("prune_attn", TORCH_BOX(&plain<run_cuda>));
  m.impl("prune_attn.packed", TORCH_BOX(&packed<run_cuda>));
}

}  // namespace
}  // namespace tokred
