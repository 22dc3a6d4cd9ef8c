// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/prune_topk.h"

#include "torch/glue.h"
#include "torch/glue_rows.h"

namespace tokred {
namespace {

struct Call {
  PruneTopkArgs args;
  Tensor kept_idx;
  std::vector<Tensor> kept;  // x first
};

const uint8_t* check_mask(const char* name, const OptTensor& mask, const Tensor& score) {
  if (!mask) return nullptr;
  check_dtype("prune_topk", name, *mask, ScalarType::Bool);
  check_same_device("prune_topk", "x", score, name, *mask);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < score.dim(); ++i) shape.push_back(score.size(i));
  check_shape("prune_topk", name, *mask, shape, "of score");
  check_contiguous("prune_topk", name, *mask);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

Call prepare(const Tensor& x, const Tensor& score, int64_t k, const OptTensor& keep_mask, const OptTensor& drop_mask,
             const OptTensor& cu_seqlens, int64_t max_seqlen, const std::vector<Tensor>& others, int64_t keep_first,
             int64_t keep_last, bool strict) {
  const bool packed = cu_seqlens.has_value();
  const int64_t lead = packed ? 1 : 2;
  TOKRED_CHECK(x.dim() == lead + 1, "prune_topk: expected x of shape ",
               packed ? "[total_tokens, dim] (with cu_seqlens)" : "[batch_size, num_tokens, dim]", ", got ",
               shape_of(x));
  const int64_t num_tokens = x.size(lead - 1);
  if (packed) {
    check_shape("prune_topk", "score", score, {num_tokens}, "[total_tokens]");
    check_cu_seqlens("prune_topk", *cu_seqlens, "x", x);
    TOKRED_CHECK(max_seqlen >= 0 && max_seqlen <= num_tokens, "prune_topk: expected max_seqlen in [0, ", num_tokens,
                 "], got ", max_seqlen);
  } else {
    check_shape("prune_topk", "score", score, {x.size(0), num_tokens}, "[batch_size, num_tokens]");
  }
  const int64_t batch_size = packed ? cu_seqlens->size(0) - 1 : x.size(0);
  const DType score_dtype = check_float("prune_topk", "score", score);
  check_last_dim("prune_topk", "score", score);
  check_same_device("prune_topk", "x", x, "score", score);
  check_int32_range("prune_topk", "num_tokens", num_tokens);
  if (strict) {
    TOKRED_CHECK(k >= 0 && k <= num_tokens, "prune_topk: expected k in [0, ", num_tokens, "], got ", k);
  } else {
    TOKRED_CHECK(k >= 0, "prune_topk: expected k >= 0, got ", k);
    check_int32_range("prune_topk", "k", k);
  }
  TOKRED_CHECK(keep_first >= 0, "prune_topk: expected keep_first >= 0, got ", keep_first);
  TOKRED_CHECK(keep_last >= 0, "prune_topk: expected keep_last >= 0, got ", keep_last);
  TOKRED_CHECK(static_cast<int>(others.size()) < kPruneTopkMaxTensors, "prune_topk: expected at most ",
               kPruneTopkMaxTensors - 1, " companions in others, got ", others.size());
  const uint8_t* keep = check_mask("keep_mask", keep_mask, score);
  const uint8_t* drop = check_mask("drop_mask", drop_mask, score);

  Call call{{}, new_empty(x, {batch_size, k}, ScalarType::Long), {}};
  call.args.num_tensors = 0;
  for (size_t i = 0; i <= others.size(); ++i) {
    const Tensor& tensor = i == 0 ? x : others[i - 1];
    const std::string name = i == 0 ? "x" : concat("others[", i - 1, "]");
    if (i > 0) {
      check_same_device("prune_topk", "x", x, name.c_str(), tensor);
      bool same = tensor.dim() >= lead;
      for (int64_t d = 0; same && d < lead; ++d) same = tensor.size(d) == x.size(d);
      TOKRED_CHECK(same, "prune_topk: expected ", name, " of shape ",
                   packed ? "[total_tokens, ...]" : "[batch_size, num_tokens, ...]", " with the sizes of x ",
                   shape_of(x), ", got ", shape_of(tensor));
    }
    std::vector<int64_t> shape{batch_size, k};
    for (int64_t d = lead; d < tensor.dim(); ++d) shape.push_back(tensor.size(d));
    call.kept.push_back(new_empty(tensor, shape));
    RowTensor& companion = call.args.tensors[call.args.num_tensors++];
    companion = check_rows("prune_topk", name, tensor, lead - 1);
    companion.dst = static_cast<char*>(call.kept.back().mutable_data_ptr());
  }
  TopkRows& rows = call.args.rows;
  rows = {};
  rows.score = score.const_data_ptr();
  rows.keep_mask = keep;
  rows.drop_mask = drop;
  rows.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  rows.kept_idx = static_cast<int64_t*>(call.kept_idx.mutable_data_ptr());
  rows.num_rows = batch_size;
  rows.num_heads = 1;
  rows.num_tokens = num_tokens;
  rows.max_seqlen = packed ? max_seqlen : num_tokens;
  rows.k = k;
  rows.keep_first = keep_first;
  rows.keep_last = keep_last;
  if (!packed) {
    rows.score_stride.batch = score.stride(0);
    rows.keep_stride.batch = rows.drop_stride.batch = num_tokens;
  }
  rows.dtype = score_dtype;
  return call;
}

using Run = void (*)(const PruneTopkArgs& args, const Tensor& x);

void run_cpu(const PruneTopkArgs& args, const Tensor&) { prune_topk_cpu(args); }
[[maybe_unused]] void run_cuda(const PruneTopkArgs& args, const Tensor& x) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(x);
  PruneTopkArgs with_workspace = args;
  const PruneTopkPolicy policy = choose_policy(args.rows.max_seqlen, args.rows.k);
  Tensor workspace =
      new_empty(x, {policy.fused ? 0 : topk_workspace_words(policy.select, args.rows.num_rows)}, ScalarType::Int);
  with_workspace.rows.workspace = static_cast<uint32_t*>(workspace.mutable_data_ptr());
  check_cuda("prune_topk", prune_topk_cuda(with_workspace, device.stream()));
#endif
}

template <Run run>
std::tuple<Tensor, Tensor> plain(const Tensor& x, const Tensor& score, int64_t k, const OptTensor& keep_mask,
                                 const OptTensor& drop_mask) {
  Call call = prepare(x, score, k, keep_mask, drop_mask, std::nullopt, 0, {}, 0, 0, /*strict=*/true);
  run(call.args, x);
  return {call.kept[0], call.kept_idx};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> packed(const Tensor& x, const Tensor& score, int64_t k,
                                                               const OptTensor& keep_mask, const OptTensor& drop_mask,
                                                               const OptTensor& cu_seqlens, int64_t max_seqlen,
                                                               const std::optional<std::vector<Tensor>>& others,
                                                               int64_t keep_first, int64_t keep_last) {
  Call call =
      prepare(x, score, k, keep_mask, drop_mask, cu_seqlens, max_seqlen, others ? *others : std::vector<Tensor>{},
              keep_first, keep_last, /*strict=*/!cu_seqlens.has_value());
  Tensor num_kept = new_empty(x, {call.args.rows.num_rows}, ScalarType::Int);
  call.args.rows.num_kept = static_cast<int32_t*>(num_kept.mutable_data_ptr());
  run(call.args, x);
  return {call.kept[0], call.kept_idx, num_kept, {call.kept.begin() + 1, call.kept.end()}};
}

// Sizes: batch_size, num_tokens, dim, k, element_size.
Plan plan_prune_topk(const PlanSizes& sizes) {
  const int64_t batch_size = sizes["batch_size"], num_tokens = sizes["num_tokens"], k = sizes["k"];
  const int64_t row_bytes = sizes["dim"] * sizes["element_size"];
  const PruneTopkPolicy policy = choose_policy(num_tokens, k);
  Plan plan;
  if (policy.fused) {
    const int64_t copies = prune_topk_splits(batch_size, k, row_bytes);
    plan.launches.push_back({"select_and_copy", {batch_size * copies}, policy.threads});
  } else {
    plan_topk_rows(plan, policy.select, batch_size);
    plan.launches.push_back({"copy", {ceil_div<int64_t>(batch_size * k * row_bytes, 16384)}, 256});
  }
  return plan;
}
TOKRED_PLAN(prune_topk, plan_prune_topk)

TOKRED_SCHEMA(m) {
  m.def(
      "prune_topk(Tensor x, Tensor score, SymInt k, Tensor? keep_mask=None, Tensor? drop_mask=None)"
      " -> (Tensor x_kept, Tensor kept_idx)");
  m.def(
      "prune_topk.packed(Tensor x, Tensor score, SymInt k, Tensor? keep_mask=None, Tensor? drop_mask=None,"
      " Tensor? cu_seqlens=None, SymInt max_seqlen=0, Tensor[]? others=None, SymInt keep_first=0, SymInt keep_last=0)"
      " -> (Tensor x_kept, Tensor kept_idx, Tensor num_kept, Tensor[] others_kept)");
}
TOKRED_IMPL_CPU(m) {
  m.impl("prune_topk", TORCH_BOX(&plain<run_cpu>));
  m.impl("prune_topk.packed", TORCH_BOX(&packed<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("prune_topk", TORCH_BOX(&plain<run_cuda>));
  m.impl("prune_topk.packed", TORCH_BOX(&packed<run_cuda>));
}

}  // namespace
}  // namespace tokred
