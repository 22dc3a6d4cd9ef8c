// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/qk_score.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "qk_score";

// Sets k, pages, kv_len and num_kv_heads of a.
void check_k(const Tensor& q, const Tensor& k, const OptTensor& page_table, QkRows& a) {
  const bool paged = page_table.has_value();
  TOKRED_CHECK(k.dim() == 4 && (paged || k.size(0) == a.batch_size), "qk_score: expected k of shape ",
               paged ? "[num_pages, page_size, num_kv_heads, head_dim] (with page_table)"
                     : concat("[batch_size, num_kv_heads, kv_len, head_dim] with batch_size ", a.batch_size),
               ", got ", shape_of(k));
  TOKRED_CHECK(k.scalar_type() == q.scalar_type(), "qk_score: expected k of the dtype of q (", dtype_of(q), "), got ",
               dtype_of(k));
  TOKRED_CHECK(k.size(3) == q.size(3), "qk_score: expected k with the head_dim ", q.size(3), " of q, got ",
               shape_of(k));
  check_same_device(kOp, "q", q, "k", k);
  check_last_dim(kOp, "k", k);
  a.num_kv_heads = k.size(paged ? 2 : 1);
  TOKRED_CHECK(a.num_kv_heads > 0 && a.num_q_heads > 0 && a.num_q_heads % a.num_kv_heads == 0,
               "qk_score: expected num_q_heads to be a multiple of num_kv_heads, got ", a.num_q_heads, " and ",
               a.num_kv_heads);
  a.k = kv_tensor(k, paged);
  if (paged) a.pages = check_pages(kOp, "q", q, k, *page_table);
  a.kv_len = paged ? a.pages.max_pages << a.pages.shift : k.size(2);
  check_int32_range(kOp, "kv_len", a.kv_len);
}

struct Call {
  QkRows args;
  Tensor out;
};

Call prepare(const Tensor& q, const Tensor& k, const OptTensor& page_table, const OptTensor& kv_lens,
             const OptTensor& head_weight, const OptTensor& channels, bool relu, bool sum_heads, double scale) {
  QkRows a{};
  TOKRED_CHECK(q.dim() == 4, "qk_score: expected q of shape [batch_size, num_q_heads, q_len, head_dim], got ",
               shape_of(q));
  a.dtype = check_float(kOp, "q", q);
  TOKRED_CHECK(q.size(3) >= 1 && q.size(3) <= kQkRowsMaxHeadDim, "qk_score: expected q with head_dim in [1, ",
               kQkRowsMaxHeadDim, "], got ", q.size(3));
  TOKRED_CHECK(q.size(2) <= kQkRowsMaxQueries, "qk_score: expected q with q_len in [0, ", kQkRowsMaxQueries, "], got ",
               q.size(2));
  check_last_dim(kOp, "q", q);
  a.q = q.const_data_ptr();
  a.batch_size = q.size(0);
  a.num_q_heads = q.size(1);
  a.q_len = q.size(2);
  a.q_batch = q.stride(0);
  a.q_head = q.stride(1);
  a.q_token = q.stride(2);
  check_k(q, k, page_table, a);
  a.kv_lens = check_kv_lens(kOp, "q", q, kv_lens);
  a.relu = relu;
  a.sum_heads = sum_heads;
  a.scale = static_cast<float>(scale);
  if (head_weight) {
    TOKRED_CHECK(sum_heads, "qk_score: expected sum_heads with head_weight, got sum_heads=False");
    check_dtype(kOp, "head_weight", *head_weight, ScalarType::Float);
    check_shape(kOp, "head_weight", *head_weight, {a.batch_size, a.q_len, a.num_q_heads},
                "[batch_size, q_len, num_q_heads]");
    check_contiguous(kOp, "head_weight", *head_weight);
    check_same_device(kOp, "q", q, "head_weight", *head_weight);
    a.head_weight = static_cast<const float*>(head_weight->const_data_ptr());
  }
  if (channels) {
    TOKRED_CHECK(channels->dim() == 1 || (channels->dim() == 2 && channels->size(0) == a.num_kv_heads),
                 "qk_score: expected channels of shape [num_channels] or [num_kv_heads, num_channels] with "
                 "num_kv_heads ",
                 a.num_kv_heads, ", got ", shape_of(*channels));
    a.channels = check_index(kOp, "channels", *channels);
    check_same_device(kOp, "q", q, "channels", *channels);
    a.channel_heads = channels->dim() == 1 ? 1 : a.num_kv_heads;
    a.num_channels = channels->size(channels->dim() - 1);
    a.use_channels = true;
  }
  const std::vector<int64_t> shape = sum_heads ? std::vector<int64_t>{a.batch_size, a.q_len, a.kv_len}
                                               : std::vector<int64_t>{a.batch_size, a.num_q_heads, a.q_len, a.kv_len};
  Call call{a, new_empty(q, shape, ScalarType::Float)};
  call.args.out = static_cast<float*>(call.out.mutable_data_ptr());
  return call;
}

using Run = void (*)(const QkRows& args, const Tensor& q);

void run_cpu(const QkRows& args, const Tensor&) { qk_score_cpu(args); }

[[maybe_unused]] void run_cuda(const QkRows& args, const Tensor& q) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(q);
  check_cuda(kOp, qk_score_cuda(args, device.stream()));
#endif
}

template <Run run>
Tensor qk_score(const Tensor& q, const Tensor& k, const OptTensor& page_table, const OptTensor& kv_lens,
                const OptTensor& head_weight, const OptTensor& channels, bool relu, bool sum_heads, double scale) {
  Call call = prepare(q, k, page_table, kv_lens, head_weight, channels, relu, sum_heads, scale);
  run(call.args, q);
  return call.out;
}

Plan plan_qk_score(const PlanSizes& s) {
  QkRows a{};
  a.batch_size = s["batch_size"];
  a.num_q_heads = s["num_q_heads"];
  a.num_kv_heads = s["num_kv_heads"];
  a.q_len = s.get("q_len", 1);
  a.kv_len = s["kv_len"];
  a.k.dim = s["head_dim"];
  a.sum_heads = s.get("sum_heads", 0) != 0;
  a.dtype = s.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  const QkRowsPolicy p = choose_qk_policy(a);
  Plan plan;
  plan.launches.push_back({"qk_rows_kernel", {num_blocks(a, p), 1, 1}, kQkRowsThreads});
  return plan;
}
TOKRED_PLAN(qk_score, plan_qk_score)

TOKRED_SCHEMA(m) {
  m.def(
      "qk_score(Tensor q, Tensor k, Tensor? page_table=None, Tensor? kv_lens=None, Tensor? head_weight=None,"
      " Tensor? channels=None, bool relu=False, bool sum_heads=False, float scale=1.0) -> Tensor score");
}
TOKRED_IMPL_CPU(m) { m.impl("qk_score", TORCH_BOX(&qk_score<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("qk_score", TORCH_BOX(&qk_score<run_cuda>)); }

}  // namespace
}  // namespace tokred
