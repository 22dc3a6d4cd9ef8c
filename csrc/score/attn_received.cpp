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
  Tensor received, lse, partial, diagonal;
};

AttnReceivedStrides strides(const Tensor& x, bool packed) {  // packed k and q: [tokens, heads, head_dim]
  return packed ? AttnReceivedStrides{0, x.stride(1), x.stride(0)}
                : AttnReceivedStrides{x.stride(0), x.stride(1), x.stride(2)};
}
// Of a tensor [batch_size, heads, tokens], or [heads, tokens] when packed.
AttnReceivedStrides row_strides(const Tensor& x, bool packed) {
  return packed ? AttnReceivedStrides{0, x.stride(0), x.stride(1)}
                : AttnReceivedStrides{x.stride(0), x.stride(1), x.stride(2)};
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

std::vector<int64_t> with_batch(const AttnReceivedArgs& a, bool packed, std::vector<int64_t> shape) {
  if (!packed) shape.insert(shape.begin(), a.batch_size);
  return shape;
}

// lse and q_weight: float32, a value per query head and query.
const float* check_rows(const char* name, const OptTensor& x, const Tensor& q, const AttnReceivedArgs& a, bool packed,
                        AttnReceivedStrides& stride) {
  if (!x) return nullptr;
  check_dtype(kOp, name, *x, ScalarType::Float);
  check_same_device(kOp, "q", q, name, *x);
  check_shape(kOp, name, *x, with_batch(a, packed, {a.num_q_heads, a.q_len}),
              packed ? "[num_q_heads, total_q]" : "[batch_size, num_q_heads, q_len]");
  check_last_dim(kOp, name, *x);
  stride = row_strides(*x, packed);
  return static_cast<const float*>(x->const_data_ptr());
}

// One bias for all heads, one per key head, or one per query head: then each query head is a group of its own.
void check_key_bias(const Tensor& q, const Tensor& bias, AttnReceivedArgs& a, bool packed) {
  check_dtype(kOp, "key_bias", bias, ScalarType::Float);
  check_same_device(kOp, "q", q, "key_bias", bias);
  const int64_t head_dim = packed ? 0 : 1;
  TOKRED_CHECK(
      bias.dim() == head_dim + 2 && (packed || bias.size(0) == a.batch_size) && bias.size(head_dim + 1) == a.kv_len,
      "attn_received: expected key_bias of shape ",
      packed ? concat("[heads, total_k] with total_k ", a.kv_len)
             : concat("[batch_size, heads, kv_len] with batch_size ", a.batch_size, " and kv_len ", a.kv_len),
      ", got ", shape_of(bias));
  const int64_t heads = bias.size(head_dim);
  TOKRED_CHECK(heads == a.num_q_heads || heads == a.num_kv_heads || heads == 1,
               "attn_received: expected key_bias with ", a.num_q_heads, " (query heads), ", a.num_kv_heads,
               " (kv heads) or 1 heads, got ", shape_of(bias));
  check_last_dim(kOp, "key_bias", bias);
  a.key_bias = static_cast<const float*>(bias.const_data_ptr());
  a.bias_batch = packed ? 0 : bias.stride(0);
  a.bias_head = heads == 1 ? 0 : bias.stride(head_dim);
  if (heads != a.num_q_heads || heads == 1) return;
  a.k_repeat = a.group();
  a.num_kv_heads = a.num_q_heads;
}

void check_options(const Tensor& q, const Options& o, AttnReceivedArgs& a, bool packed) {
  TOKRED_CHECK(o.reduce == "sum" || o.reduce == "max",
               "attn_received: expected reduce to be \"sum\" or \"max\", got \"", o.reduce, "\"");
  a.max_reduce = o.reduce == "max";
  a.scale = static_cast<float>(o.scale ? *o.scale : 1 / std::sqrt(static_cast<double>(a.head_dim)));
  TOKRED_CHECK(a.scale > 0 && std::isfinite(a.scale), "attn_received: expected scale > 0 and finite, got ", *o.scale);
  a.softcap = static_cast<float>(o.softcap ? *o.softcap : 0);
  TOKRED_CHECK(!o.softcap || (a.softcap > 0 && std::isfinite(a.softcap)),
               "attn_received: expected softcap > 0 and finite, got ", *o.softcap);
  TOKRED_CHECK(!o.window || *o.window >= 0, "attn_received: expected window >= 0, got ", *o.window);
  a.lse_in = check_rows("lse", o.lse, q, a, packed, a.stride_lse_in);
  a.q_weight = check_rows("q_weight", o.q_weight, q, a, packed, a.stride_weight);
  if (o.sink) {
    TOKRED_CHECK(!o.lse, "attn_received: expected sink or lse, not both: a given lse is the whole denominator");
    check_dtype(kOp, "sink", *o.sink, ScalarType::Float);
    check_shape(kOp, "sink", *o.sink, {a.num_q_heads}, "[num_q_heads]");
    check_contiguous(kOp, "sink", *o.sink);
    check_same_device(kOp, "q", q, "sink", *o.sink);
    a.sink = static_cast<const float*>(o.sink->const_data_ptr());
  }
  if (o.key_bias) check_key_bias(q, *o.key_bias, a, packed);
  constexpr int64_t kFar = int64_t{1} << 40;  // beyond every key
  a.align_ends = !o.q_start;
  a.q_start = o.q_start ? std::max(-kFar, std::min(*o.q_start, kFar)) : 0;
  a.back = o.window ? std::min(*o.window, kFar) : 2 * kFar;
  a.ahead = o.causal ? 0 : a.back;
  a.exponent_scale = a.adjusted() ? 1.f : a.scale * kLog2e;
}

// What all layouts have in common. token, head: dimensions of q and of k.
AttnReceivedArgs check_heads(const Tensor& q, const Tensor& k, int64_t q_token, int64_t q_head, int64_t k_head) {
  AttnReceivedArgs a{};
  const int64_t last = q.dim() - 1;
  TOKRED_CHECK(k.size(k_head) > 0 ? q.size(q_head) % k.size(k_head) == 0 : q.size(q_head) == 0,
               "attn_received: expected num_q_heads to be a multiple of num_kv_heads, got ", q.size(q_head), " and ",
               k.size(k_head));
  TOKRED_CHECK(q.size(last) >= 1 && q.size(last) <= kAttnReceivedMaxHeadDim, "attn_received: expected head_dim in [1, ",
               kAttnReceivedMaxHeadDim, "], got ", q.size(last));
  a.dtype = check_float(kOp, "q", q);
  TOKRED_CHECK(k.scalar_type() == q.scalar_type(), "attn_received: expected k of q's dtype ", dtype_of(q), ", got ",
               dtype_of(k));
  check_same_device(kOp, "q", q, "k", k);
  check_last_dim(kOp, "q", q);
  check_last_dim(kOp, "k", k);
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.num_q_heads = q.size(q_head);
  a.num_kv_heads = k.size(k_head);
  a.k_repeat = 1;
  a.q_len = q.size(q_token);
  a.head_dim = q.size(last);
  if (a.num_kv_heads > 0) check_int32_range(kOp, "q_len times heads per group", a.q_len * a.group());
  return a;
}

AttnReceivedArgs check_dense(const Tensor& q, const Tensor& k, const Options& options) {
  TOKRED_CHECK(q.dim() == 4, "attn_received: expected q of shape [batch_size, num_q_heads, q_len, head_dim], got ",
               shape_of(q));
  TOKRED_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3),
               "attn_received: expected k of shape [batch_size, num_kv_heads, kv_len, head_dim] with the batch_size and"
               " head_dim of q ",
               shape_of(q), ", got ", shape_of(k));
  AttnReceivedArgs a = check_heads(q, k, 2, 1, 1);
  a.stride_q = strides(q, false);
  a.stride_k = strides(k, false);
  a.batch_size = q.size(0);
  a.kv_len = k.size(2);
  check_int32_range(kOp, "q_len + kv_len", a.q_len + a.kv_len);
  check_options(q, options, a, false);
  return a;
}

AttnReceivedArgs check_packed(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens, const OptTensor& cu_seqlens_k,
                              const Options& options) {
  TOKRED_CHECK(q.dim() == 3,
               "attn_received: expected q of shape [total_q, num_q_heads, head_dim] (with cu_seqlens), got ",
               shape_of(q));
  TOKRED_CHECK(
      k.dim() == 3 && k.size(2) == q.size(2),
      "attn_received: expected k of shape [total_k, num_kv_heads, head_dim] (with cu_seqlens) with the head_dim"
      " of q ",
      shape_of(q), ", got ", shape_of(k));
  check_cu_seqlens(kOp, cu_seqlens, "q", q);
  AttnReceivedArgs a = check_heads(q, k, 0, 1, 1);
  a.stride_q = strides(q, true);
  a.stride_k = strides(k, true);
  a.batch_size = cu_seqlens.size(0) - 1;
  a.kv_len = k.size(0);
  a.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  a.cu_seqlens_k = a.cu_seqlens;
  if (cu_seqlens_k) {
    check_shape(kOp, "cu_seqlens_k", *cu_seqlens_k, {cu_seqlens.size(0)}, "[batch_size + 1]");
    check_cu_seqlens(kOp, *cu_seqlens_k, "q", q, "cu_seqlens_k");
    a.cu_seqlens_k = data_or_null<int32_t>(cu_seqlens_k);
  } else {
    TOKRED_CHECK(q.size(0) == k.size(0), "attn_received: expected cu_seqlens_k, or as many keys as queries, got ",
                 shape_of(q), " and ", shape_of(k));
  }
  check_int32_range(kOp, "total_q + total_k", a.q_len + a.kv_len);
  check_options(q, options, a, true);
  return a;
}

AttnReceivedArgs check_paged(const Tensor& q, const Tensor& k, const Tensor& page_table, const OptTensor& kv_lens,
                             const Options& options) {
  TOKRED_CHECK(q.dim() == 4, "attn_received: expected q of shape [batch_size, num_q_heads, q_len, head_dim], got ",
               shape_of(q));
  TOKRED_CHECK(
      k.dim() == 4 && k.size(3) == q.size(3),
      "attn_received: expected k of shape [num_pages, page_size, num_kv_heads, head_dim] (with page_table) with"
      " the head_dim of q ",
      shape_of(q), ", got ", shape_of(k));
  const int64_t page_size = k.size(1);
  TOKRED_CHECK(page_size == 1 || page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128,
               "attn_received: expected k with page_size 1, 16, 32, 64 or 128, got ", page_size);
  TOKRED_CHECK(page_table.dim() == 2 && page_table.size(0) == q.size(0),
               "attn_received: expected page_table of shape [batch_size, max_pages] with batch_size ", q.size(0),
               ", got ", shape_of(page_table));
  AttnReceivedArgs a = check_heads(q, k, 2, 1, 2);
  a.stride_q = strides(q, false);
  a.stride_k = {0, k.stride(2), k.stride(1)};
  a.batch_size = q.size(0);
  check_dtype(kOp, "page_table", page_table, ScalarType::Int);
  check_contiguous(kOp, "page_table", page_table);
  check_same_device(kOp, "q", q, "page_table", page_table);
  a.page_table = static_cast<const int32_t*>(page_table.const_data_ptr());
  if (kv_lens) {
    check_dtype(kOp, "kv_lens", *kv_lens, ScalarType::Int);
    check_shape(kOp, "kv_lens", *kv_lens, {a.batch_size}, "[batch_size]");
    check_contiguous(kOp, "kv_lens", *kv_lens);
    check_same_device(kOp, "q", q, "kv_lens", *kv_lens);
    a.kv_lens = static_cast<const int32_t*>(kv_lens->const_data_ptr());
  }
  a.num_pages = k.size(0);
  a.stride_page = k.stride(0);
  a.max_pages = page_table.size(1);
  a.page_shift = __builtin_ctzll(page_size);
  a.kv_len = a.max_pages * page_size;
  check_int32_range(kOp, "q_len + max_pages * page_size", a.q_len + a.kv_len);
  check_options(q, options, a, false);
  return a;
}

// longest: an upper bound of a sequence's keys.
using Run = void (*)(Call& call, const Tensor& q, int64_t longest);

void run_cpu(Call& call, const Tensor&, int64_t) {
  attn_received_cpu(call.args);
  if (call.args.diagonal) attn_received_diagonal_cpu(call.args);
}
[[maybe_unused]] void run_cuda(Call& call, const Tensor& q, int64_t longest) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  AttnReceivedArgs& a = call.args;
  const OnDevice device(q);
  // Packed: of the few rows that a sequence may have.
  if (!a.lse_in && longest > AttnReceivedArgs::split_keys(a.packed() ? 1 : a.group() * a.q_len)) {
    call.partial = new_empty(q, {a.batch_dim() * a.num_kv_heads, a.partial_plane(), 2}, ScalarType::Float);
    a.partial = static_cast<float*>(call.partial.mutable_data_ptr());
  }
  check_cuda(kOp, attn_received_cuda(a, device.stream()));
  if (a.diagonal) check_cuda(kOp, attn_received_diagonal_cuda(a, device.stream()));
#endif
}

Call finish(Run run, const AttnReceivedArgs& args, const Tensor& q, int64_t longest, bool diagonal = false) {
  const auto output = [&](int64_t columns) {
    return new_empty(q, with_batch(args, args.packed(), {args.num_q_heads, columns}), ScalarType::Float);
  };
  Call call{args, output(args.kv_len), output(args.q_len), {}, {}};
  call.args.received = static_cast<float*>(call.received.mutable_data_ptr());
  call.args.lse = static_cast<float*>(call.lse.mutable_data_ptr());
  if (diagonal) {
    call.diagonal = output(args.kv_len);
    call.args.diagonal = static_cast<float*>(call.diagonal.mutable_data_ptr());
  }
  run(call, q, longest);
  return call;
}
std::tuple<Tensor, Tensor> received_and_lse(const Call& call) { return {call.received, call.lse}; }

template <Run run>
std::tuple<Tensor, Tensor> dense(const Tensor& q, const Tensor& k, const OptTensor& lse, const OptTensor& q_weight,
                                 bool causal, std::optional<int64_t> q_start, std::string reduce,
                                 std::optional<double> scale, std::optional<int64_t> window,
                                 std::optional<double> softcap, const OptTensor& sink, const OptTensor& key_bias) {
  const Options options{lse, q_weight, causal, q_start, reduce, scale, window, softcap, sink, key_bias};
  return received_and_lse(finish(run, check_dense(q, k, options), q, k.size(2)));
}

template <Run run>
std::tuple<Tensor, Tensor> packed(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens,
                                  const OptTensor& cu_seqlens_k, std::optional<int64_t> max_seqlen,
                                  const OptTensor& lse, const OptTensor& q_weight, bool causal,
                                  std::optional<int64_t> q_start, std::string reduce, std::optional<double> scale,
                                  std::optional<int64_t> window, std::optional<double> softcap, const OptTensor& sink,
                                  const OptTensor& key_bias) {
  const Options options{lse, q_weight, causal, q_start, reduce, scale, window, softcap, sink, key_bias};
  const AttnReceivedArgs args = check_packed(q, k, cu_seqlens, cu_seqlens_k, options);
  TOKRED_CHECK(!max_seqlen || *max_seqlen >= 0, "attn_received: expected max_seqlen >= 0, got ", *max_seqlen);
  return received_and_lse(finish(run, args, q, max_seqlen ? std::min(*max_seqlen, args.kv_len) : args.kv_len));
}

template <Run run>
std::tuple<Tensor, Tensor> paged(const Tensor& q, const Tensor& k, const Tensor& page_table, const OptTensor& kv_lens,
                                 const OptTensor& lse, const OptTensor& q_weight, bool causal,
                                 std::optional<int64_t> q_start, std::string reduce, std::optional<double> scale,
                                 std::optional<int64_t> window, std::optional<double> softcap, const OptTensor& sink,
                                 const OptTensor& key_bias) {
  const Options options{lse, q_weight, causal, q_start, reduce, scale, window, softcap, sink, key_bias};
  const AttnReceivedArgs args = check_paged(q, k, page_table, kv_lens, options);
  return received_and_lse(finish(run, args, q, args.kv_len));
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> diagonal(const Tensor& q, const Tensor& k, const OptTensor& lse,
                                            const OptTensor& q_weight, std::optional<double> scale,
                                            std::optional<int64_t> window, std::optional<double> softcap,
                                            const OptTensor& sink, const OptTensor& key_bias) {
  const std::string reduce = "sum";
  const Options options{lse, q_weight, true, std::nullopt, reduce, scale, window, softcap, sink, key_bias};
  const Call call = finish(run, check_dense(q, k, options), q, k.size(2), /*diagonal=*/true);
  return {call.received, call.lse, call.diagonal};
}

// One sequence per batch row: packed ones differ, which no plan can know.
Plan plan(const PlanSizes& sizes) {
  AttnReceivedArgs a{};
  a.batch_size = sizes.get("batch_size", 1);
  a.num_kv_heads = sizes["num_kv_heads"];
  a.num_q_heads = sizes["num_q_heads"];
  a.q_len = sizes["q_len"];
  a.kv_len = sizes["kv_len"];
  a.head_dim = sizes["head_dim"];
  a.dtype = sizes.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  const bool lse_given = sizes.get("lse", 0) != 0;
  const int64_t rows = a.group() * a.q_len, heads = a.batch_size * a.num_kv_heads;
  float some;
  a.partial = a.kv_len > AttnReceivedArgs::split_keys(rows) ? &some : nullptr;
  const auto policy = choose_attn_received_policy(a);
  Plan plan;
  const auto add = [&](const char* name, int64_t blocks, int64_t threads) {
    plan.launches.push_back({name, {blocks, 1, 1}, threads});
  };
  if (lse_given) {
    add("copy_lse", ceil_div<int64_t>(heads * rows, 256), 256);
  } else {
    const AttnBlocks blocks = attn_lse_blocks(a, policy.warps_lse * policy.rows_per_warp);
    add("attn_lse", heads * blocks.per_head, policy.warps_lse * 32);
    if (a.partial) add("combine_lse", ceil_div<int64_t>(heads * rows, 8), 256);
  }
  const AttnBlocks blocks = attn_received_blocks(a, policy.warps_received * policy.rows_per_warp);
  add("attn_received", heads * blocks.per_head, policy.warps_received * 32);
  if (sizes.get("diagonal", 0) != 0) {
    const AttnDiagonalPolicy bands = choose_attn_diagonal_policy(a.head_dim, a.dtype);
    add("attn_diagonal", heads * ceil_div<int64_t>(a.kv_len, bands.diagonals), bands.warps * 32);
  }
  return plan;
}
TOKRED_PLAN(attn_received, plan)

#define TOKRED_ATTN_OPTIONS                                                                                 \
  "Tensor? lse=None, Tensor? q_weight=None, bool causal=False, SymInt? q_start=None, str reduce=\"sum\","   \
  " float? scale=None, SymInt? window=None, float? softcap=None, Tensor? sink=None, Tensor? key_bias=None)" \
  " -> (Tensor received, Tensor lse)"
TOKRED_SCHEMA(m) {
  m.def("attn_received(Tensor q, Tensor k, " TOKRED_ATTN_OPTIONS);
  m.def(
      "attn_received.packed(Tensor q, Tensor k, Tensor cu_seqlens, Tensor? cu_seqlens_k=None,"
      " SymInt? max_seqlen=None, " TOKRED_ATTN_OPTIONS);
  m.def(
      "attn_received.diagonal(Tensor q, Tensor k, Tensor? lse=None, Tensor? q_weight=None, float? scale=None,"
      " SymInt? window=None, float? softcap=None, Tensor? sink=None, Tensor? key_bias=None)"
      " -> (Tensor received, Tensor lse, Tensor diagonal)");
  m.def("attn_received.paged(Tensor q, Tensor k, Tensor page_table, Tensor? kv_lens=None, " TOKRED_ATTN_OPTIONS);
}
TOKRED_IMPL_CPU(m) {
  m.impl("attn_received", TORCH_BOX(&dense<run_cpu>));
  m.impl("attn_received.packed", TORCH_BOX(&packed<run_cpu>));
  m.impl("attn_received.paged", TORCH_BOX(&paged<run_cpu>));
  m.impl("attn_received.diagonal", TORCH_BOX(&diagonal<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("attn_received", TORCH_BOX(&dense<run_cuda>));
  m.impl("attn_received.packed", TORCH_BOX(&packed<run_cuda>));
  m.impl("attn_received.paged", TORCH_BOX(&paged<run_cuda>));
  m.impl("attn_received.diagonal", TORCH_BOX(&diagonal<run_cuda>));
}

}  // namespace
}  // namespace tokred
