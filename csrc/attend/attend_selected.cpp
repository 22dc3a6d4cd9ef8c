// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "attend/attend_selected.h"

#include <cmath>

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "attend_selected";

// Heads of kept_idx or key_bias, which may come per query head, per kv head, or once.
void check_heads(const char* name, const Tensor& x, const AttendSelectedArgs& a) {
  const int64_t heads = x.size(1);
  TOKRED_CHECK(heads == a.num_q_heads || heads == a.num_kv_heads || heads == 1, "attend_selected: expected ", name,
               " with ", a.num_q_heads, " (query heads), ", a.num_kv_heads, " (kv heads) or 1 heads, got ",
               shape_of(x));
}

// Sets k, v, kv_len, pages and kv heads of a.
void check_kv(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& page_table, AttendSelectedArgs& a) {
  const bool paged = page_table.has_value();
  const char* layout = paged ? "[num_pages, page_size, num_kv_heads, head_dim] (with page_table)"
                             : "[batch_size, num_kv_heads, kv_len, head_dim]";
  const int64_t head_axis = paged ? 2 : 1, token_axis = paged ? 1 : 2;
  TOKRED_CHECK(k.dim() == 4 && (paged || k.size(0) == a.batch_size), "attend_selected: expected k of shape ", layout,
               paged ? "" : concat(" with batch_size ", a.batch_size).c_str(), ", got ", shape_of(k));
  TOKRED_CHECK(k.size(3) == q.size(3), "attend_selected: expected k with the head_dim ", q.size(3), " of q, got ",
               shape_of(k));
  bool same = v.dim() == 4;
  for (int64_t d = 0; same && d < 3; ++d) same = v.size(d) == k.size(d);
  TOKRED_CHECK(same, "attend_selected: expected v of shape [", k.size(0), ", ", k.size(1), ", ", k.size(2),
               ", head_dim_v] like k, got ", shape_of(v));
  TOKRED_CHECK(v.size(3) >= 1 && v.size(3) <= 256, "attend_selected: expected v with head_dim_v in [1, 256], got ",
               v.size(3));
  a.num_kv_heads = k.size(head_axis);
  TOKRED_CHECK(a.num_kv_heads > 0 && a.num_q_heads > 0 && a.num_q_heads % a.num_kv_heads == 0,
               "attend_selected: expected num_q_heads to be a multiple of num_kv_heads, got ", a.num_q_heads, " and ",
               a.num_kv_heads);
  a.k = kv_tensor(k, paged);
  a.v = kv_tensor(v, paged);
  a.kv_len = k.size(token_axis);
  if (!paged) return check_int32_range(kOp, "kv_len", a.kv_len);
  a.pages = check_pages(kOp, "q", q, k, *page_table);
  a.kv_len = a.pages.max_pages << a.pages.shift;
}

AttendSelectedArgs prepare(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kept_idx,
                           const OptTensor& page_table, const OptTensor& kv_lens, const OptTensor& key_bias,
                           std::optional<double> scale) {
  AttendSelectedArgs a{};
  TOKRED_CHECK(q.dim() == 4, "attend_selected: expected q of shape [batch_size, num_q_heads, q_len, head_dim], got ",
               shape_of(q));
  a.dtype = check_float(kOp, "q", q);
  TOKRED_CHECK(q.size(3) >= 1 && q.size(3) <= 256, "attend_selected: expected q with head_dim in [1, 256], got ",
               q.size(3));
  for (auto [name, x] : {std::pair("k", &k), std::pair("v", &v)}) {
    TOKRED_CHECK(x->scalar_type() == q.scalar_type(), "attend_selected: expected ", name, " of the dtype of q (",
                 dtype_of(q), "), got ", dtype_of(*x));
    check_same_device(kOp, "q", q, name, *x);
    check_last_dim(kOp, name, *x);
  }
  check_last_dim(kOp, "q", q);
  a.q = q.const_data_ptr();
  a.batch_size = q.size(0);
  a.num_q_heads = q.size(1);
  a.q_len = q.size(2);
  a.q_batch = q.stride(0);
  a.q_head = q.stride(1);
  a.q_token = q.stride(2);
  check_kv(q, k, v, page_table, a);

  TOKRED_CHECK(kept_idx.dim() == 3 && kept_idx.size(0) == a.batch_size,
               "attend_selected: expected kept_idx of shape [batch_size, heads, k] with batch_size ", a.batch_size,
               ", got ", shape_of(kept_idx));
  check_heads("kept_idx", kept_idx, a);
  a.kept_idx = check_index(kOp, "kept_idx", kept_idx);
  check_same_device(kOp, "q", q, "kept_idx", kept_idx);
  a.list_heads = kept_idx.size(1);
  a.num_listed = kept_idx.size(2);
  a.kv_lens = check_kv_lens(kOp, "q", q, kv_lens);
  if (key_bias) {
    check_dtype(kOp, "key_bias", *key_bias, ScalarType::Float);
    TOKRED_CHECK(key_bias->dim() == 3 && key_bias->size(0) == a.batch_size && key_bias->size(2) == a.kv_len,
                 "attend_selected: expected key_bias of shape [batch_size, heads, kv_len] with batch_size ",
                 a.batch_size, " and kv_len ", a.kv_len, ", got ", shape_of(*key_bias));
    check_heads("key_bias", *key_bias, a);
    check_last_dim(kOp, "key_bias", *key_bias);
    check_same_device(kOp, "q", q, "key_bias", *key_bias);
    a.key_bias = static_cast<const float*>(key_bias->const_data_ptr());
    a.bias_heads = key_bias->size(1);
    a.bias_batch = key_bias->stride(0);
    a.bias_head = key_bias->stride(1);
  }
  a.scale = scale ? static_cast<float>(*scale) : 1.f / std::sqrt(static_cast<float>(a.k.dim));
  return a;
}

void set_outputs(const Tensor& out, const Tensor& lse, AttendSelectedArgs& a) {
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.out_batch = out.stride(0);
  a.out_head = out.stride(1);
  a.out_token = out.stride(2);
}

using Run = void (*)(AttendSelectedArgs args, const Tensor& q);

void run_cpu(AttendSelectedArgs args, const Tensor&) { attend_selected_cpu(args); }

[[maybe_unused]] void run_cuda(AttendSelectedArgs args, const Tensor& q) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(q);
  const int64_t num_splits = choose_policy(args).num_splits;
  const int64_t rows = num_splits > 1 ? args.batch_size * args.num_q_heads * args.q_len : 0;
  Tensor partial = new_empty(q, {rows, num_splits, args.v.dim + 2}, ScalarType::Float);
  args.partial = num_splits > 1 ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  check_cuda(kOp, attend_selected_cuda(args, device.stream()));
#endif
}

template <Run run>
std::tuple<Tensor, Tensor> attend_selected(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kept_idx,
                                           const OptTensor& page_table, const OptTensor& kv_lens,
                                           const OptTensor& key_bias, std::optional<double> scale) {
  AttendSelectedArgs a = prepare(q, k, v, kept_idx, page_table, kv_lens, key_bias, scale);
  Tensor out = new_empty(q, {a.batch_size, a.num_q_heads, a.q_len, a.v.dim}, q.scalar_type());
  Tensor lse = new_empty(q, {a.batch_size, a.num_q_heads, a.q_len}, ScalarType::Float);
  set_outputs(out, lse, a);
  run(a, q);
  return {out, lse};
}

template <Run run>
void attend_selected_out(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kept_idx,
                         const OptTensor& page_table, const OptTensor& kv_lens, const OptTensor& key_bias,
                         std::optional<double> scale, const Tensor& out, const Tensor& lse) {
  AttendSelectedArgs a = prepare(q, k, v, kept_idx, page_table, kv_lens, key_bias, scale);
  TOKRED_CHECK(out.scalar_type() == q.scalar_type(), "attend_selected: expected out of the dtype of q (", dtype_of(q),
               "), got ", dtype_of(out));
  check_shape(kOp, "out", out, {a.batch_size, a.num_q_heads, a.q_len, a.v.dim},
              "[batch_size, num_q_heads, q_len, head_dim_v]");
  check_last_dim(kOp, "out", out);
  check_same_device(kOp, "q", q, "out", out);
  check_dtype(kOp, "lse", lse, ScalarType::Float);
  check_shape(kOp, "lse", lse, {a.batch_size, a.num_q_heads, a.q_len}, "[batch_size, num_q_heads, q_len]");
  check_contiguous(kOp, "lse", lse);
  check_same_device(kOp, "q", q, "lse", lse);
  set_outputs(out, lse, a);
  run(a, q);
}

// Floor: the listed rows of K and V once per list, the lists, q and out.
Plan plan_attend_selected(const PlanSizes& s) {
  AttendSelectedArgs a{};
  a.num_q_heads = s["num_q_heads"];
  a.num_kv_heads = s["num_kv_heads"];
  a.list_heads = s.get("list_heads", a.num_kv_heads);
  a.q_len = s.get("q_len", 1);
  a.num_listed = s["k"];
  a.k.dim = s["head_dim"];
  a.v.dim = s.get("head_dim_v", a.k.dim);
  const AttendSelectedPolicy p = choose_policy(a);
  const int64_t batch = s["batch_size"], rows = batch * a.num_q_heads * a.q_len;
  Plan plan;
  plan.launches.push_back({"attend_selected_kernel",
                           {batch * p.units * p.m_tiles * p.num_splits, 1, 1},
                           attend_selected_warps(p.tile_dim) * 32});
  if (p.num_splits > 1) plan.launches.push_back({"attend_selected_merge_kernel", {rows, 1, 1}, 128});
  return plan;
}
TOKRED_PLAN(attend_selected, plan_attend_selected)

TOKRED_SCHEMA(m) {
  m.def(
      "attend_selected(Tensor q, Tensor k, Tensor v, Tensor kept_idx, Tensor? page_table=None, Tensor? kv_lens=None,"
      " Tensor? key_bias=None, float? scale=None) -> (Tensor out, Tensor lse)");
  m.def(
      "attend_selected.out(Tensor q, Tensor k, Tensor v, Tensor kept_idx, Tensor? page_table=None,"
      " Tensor? kv_lens=None, Tensor? key_bias=None, float? scale=None, *, Tensor(a!) out, Tensor(b!) lse) -> ()");
}
TOKRED_IMPL_CPU(m) {
  m.impl("attend_selected", TORCH_BOX(&attend_selected<run_cpu>));
  m.impl("attend_selected.out", TORCH_BOX(&attend_selected_out<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("attend_selected", TORCH_BOX(&attend_selected<run_cuda>));
  m.impl("attend_selected.out", TORCH_BOX(&attend_selected_out<run_cuda>));
}

}  // namespace
}  // namespace tokred
