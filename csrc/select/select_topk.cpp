// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_topk.h"

#include "torch/glue.h"

namespace tokred {
namespace {

struct Call {
  TopkRows args;
  std::vector<int64_t> lead;  // [batch_size] or [batch_size, num_heads]
  Tensor kept_idx;
};

std::vector<int64_t> with_last(std::vector<int64_t> shape, int64_t last) {
  shape.push_back(last);
  return shape;
}

// The strides of [batch, head, num_tokens], of which the head and, when packed, the batch are not there.
RowStrides strides_between_rows(const Tensor& x, bool packed) {
  const bool heads = x.dim() == (packed ? 2 : 3);
  return {packed ? 0 : x.stride(0), heads ? x.stride(x.dim() - 2) : 0};
}

const uint8_t* check_mask(const char* name, const OptTensor& mask, const Tensor& score, bool packed,
                          RowStrides* strides) {
  if (!mask) return nullptr;
  check_dtype("select_topk", name, *mask, ScalarType::Bool);
  check_same_device("select_topk", "score", score, name, *mask);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < score.dim(); ++i) shape.push_back(score.size(i));
  check_shape("select_topk", name, *mask, shape, "of score");
  check_last_dim("select_topk", name, *mask);
  *strides = strides_between_rows(*mask, packed);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

Call prepare(const Tensor& score, int64_t k, const OptTensor& row_k, const OptTensor& keep_mask,
             const OptTensor& drop_mask, const OptTensor& cu_seqlens, int64_t max_seqlen, int64_t keep_first,
             int64_t keep_last, const std::string& order) {
  const bool packed = cu_seqlens.has_value();
  TOKRED_CHECK(packed ? score.dim() == 1 || score.dim() == 2 : score.dim() == 2 || score.dim() == 3,
               "select_topk: expected score of shape ",
               packed ? "[total_tokens] or [num_heads, total_tokens] (with cu_seqlens)"
                      : "[batch_size, num_tokens] or [batch_size, num_heads, num_tokens]",
               ", got ", shape_of(score));
  const int64_t num_tokens = score.size(score.dim() - 1);
  const bool heads = score.dim() == (packed ? 2 : 3);
  const int64_t num_heads = heads ? score.size(score.dim() - 2) : 1;
  TopkRows args{};
  args.dtype = check_float("select_topk", "score", score);
  check_last_dim("select_topk", "score", score);
  check_int32_range("select_topk", "num_tokens", num_tokens);
  if (packed) {
    TOKRED_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
                 "select_topk: expected cu_seqlens of shape [batch_size + 1], got ", shape_of(*cu_seqlens));
    check_dtype("select_topk", "cu_seqlens", *cu_seqlens, ScalarType::Int);
    check_contiguous("select_topk", "cu_seqlens", *cu_seqlens);
    check_same_device("select_topk", "score", score, "cu_seqlens", *cu_seqlens);
    TOKRED_CHECK(max_seqlen >= 0 && max_seqlen <= num_tokens, "select_topk: expected max_seqlen in [0, ", num_tokens,
                 "], got ", max_seqlen);
  }
  const int64_t batch_size = packed ? cu_seqlens->size(0) - 1 : score.size(0);
  const char* count = row_k ? "max_k" : "k";
  if (packed) {
    TOKRED_CHECK(k >= 0, "select_topk: expected ", count, " >= 0, got ", k);
    check_int32_range("select_topk", count, k);
  } else {
    TOKRED_CHECK(k >= 0 && k <= num_tokens, "select_topk: expected ", count, " in [0, ", num_tokens, "], got ", k);
  }
  std::vector<int64_t> lead{batch_size};
  if (heads) lead.push_back(num_heads);
  if (row_k) {
    check_shape("select_topk", "k", *row_k, lead, heads ? "[batch_size, num_heads]" : "[batch_size]");
    args.row_k = check_index("select_topk", "k", *row_k);
    check_same_device("select_topk", "score", score, "k", *row_k);
  }
  TOKRED_CHECK(keep_first >= 0, "select_topk: expected keep_first >= 0, got ", keep_first);
  TOKRED_CHECK(keep_last >= 0, "select_topk: expected keep_last >= 0, got ", keep_last);
  TOKRED_CHECK(order == "index" || order == "score", "select_topk: expected order 'index' or 'score', got '", order,
               "'");
  args.keep_mask = check_mask("keep_mask", keep_mask, score, packed, &args.keep_stride);
  args.drop_mask = check_mask("drop_mask", drop_mask, score, packed, &args.drop_stride);

  args.score = score.const_data_ptr();
  args.score_stride = strides_between_rows(score, packed);
  args.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  args.num_rows = batch_size * num_heads;
  args.num_heads = num_heads > 0 ? num_heads : 1;
  args.num_tokens = num_tokens;
  args.max_seqlen = packed ? max_seqlen : num_tokens;
  args.k = k;
  args.keep_first = keep_first;
  args.keep_last = keep_last;
  args.by_score = order == "score";
  check_int32_range("select_topk", "batch_size * num_heads", args.num_rows);

  Call call{args, lead, new_empty(score, with_last(lead, k), ScalarType::Long)};
  call.args.kept_idx = static_cast<int64_t*>(call.kept_idx.mutable_data_ptr());
  return call;
}

using Run = void (*)(const TopkRows& args, const Tensor& score);

void run_cpu(const TopkRows& args, const Tensor&) { select_topk_cpu(args); }
[[maybe_unused]] void run_cuda(const TopkRows& args, const Tensor& score) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(score);
  TopkRows with_workspace = args;
  Tensor workspace = new_empty(score, {select_topk_workspace_words(choose_policy(args), args)}, ScalarType::Int);
  with_workspace.workspace = static_cast<uint32_t*>(workspace.mutable_data_ptr());
  check_cuda("select_topk", select_topk_cuda(with_workspace, device.stream()));
#endif
}

template <Run run>
Tensor plain(const Tensor& score, int64_t k, const OptTensor& keep_mask, const OptTensor& drop_mask) {
  Call call = prepare(score, k, std::nullopt, keep_mask, drop_mask, std::nullopt, 0, 0, 0, "index");
  run(call.args, score);
  return call.kept_idx;
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor> full(const Tensor& score, int64_t k, const OptTensor& row_k,
                                        const OptTensor& keep_mask, const OptTensor& drop_mask,
                                        const OptTensor& cu_seqlens, int64_t max_seqlen, int64_t keep_first,
                                        int64_t keep_last, const std::string& order, bool complement) {
  Call call = prepare(score, k, row_k, keep_mask, drop_mask, cu_seqlens, max_seqlen, keep_first, keep_last, order);
  Tensor num_kept = new_empty(score, call.lead, ScalarType::Int);
  call.args.num_kept = static_cast<int32_t*>(num_kept.mutable_data_ptr());
  // Where every row is certain to keep k the rest has one size; else there is room for all.
  const bool certain = !cu_seqlens && !row_k && !drop_mask;
  call.args.num_rest = certain ? call.args.num_tokens - k : call.args.max_seqlen;
  const std::vector<int64_t> none{0};
  Tensor rest_idx = new_empty(score, complement ? with_last(call.lead, call.args.num_rest) : none, ScalarType::Long);
  if (complement) call.args.rest_idx = static_cast<int64_t*>(rest_idx.mutable_data_ptr());
  run(call.args, score);
  return {call.kept_idx, num_kept, rest_idx};
}

// Sizes: num_rows, num_tokens, k, element_size; by_score (0 or 1).
Plan plan_select_topk(const PlanSizes& sizes) {
  const int64_t num_rows = sizes["num_rows"], num_tokens = sizes["num_tokens"], k = sizes["k"];
  const bool by_score = sizes.get("by_score", 0) != 0;
  const TopkPolicy policy = choose_topk_policy(num_tokens, k, by_score);
  Plan plan;
  plan_topk_rows(plan, policy, num_rows);
  if (by_score && !policy.listed) {
    plan.launches.push_back({"sort", {num_rows * ceil_div<int64_t>(k, kTopkListed)}, kSelectTopkSortThreads});
    for (int round = select_topk_merges(k); round > 0; --round) {
      plan.launches.push_back(
          {"sort_merge", {ceil_div<int64_t>(num_rows * k, kSelectTopkThreads)}, kSelectTopkThreads});
    }
  }
  return plan;
}
TOKRED_PLAN(select_topk, plan_select_topk)

TOKRED_SCHEMA(m) {
  m.def("select_topk(Tensor score, SymInt k, Tensor? keep_mask=None, Tensor? drop_mask=None) -> Tensor kept_idx");
  m.def(
      "select_topk.full(Tensor score, SymInt k, Tensor? row_k=None, Tensor? keep_mask=None, Tensor? drop_mask=None,"
      " Tensor? cu_seqlens=None, SymInt max_seqlen=0, SymInt keep_first=0, SymInt keep_last=0, str order='index',"
      " bool complement=False) -> (Tensor kept_idx, Tensor num_kept, Tensor rest_idx)");
}
TOKRED_IMPL_CPU(m) {
  m.impl("select_topk", TORCH_BOX(&plain<run_cpu>));
  m.impl("select_topk.full", TORCH_BOX(&full<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("select_topk", TORCH_BOX(&plain<run_cuda>));
  m.impl("select_topk.full", TORCH_BOX(&full<run_cuda>));
}

}  // namespace
}  // namespace tokred
