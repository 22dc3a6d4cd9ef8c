// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/prune_topk.h"

#include "torch/glue_prune.h"

namespace tokred {
namespace {

struct Call {
  PruneTopkArgs args;
  PruneCall prune;
};

Call prepare(const Tensor& x, const Tensor& score, const PruneOptions& options) {
  Call call{{}, check_prune(x, options)};
  check_shape("prune_topk", "score", score, prune_score_shape(call.prune), prune_score_meaning(call.prune));
  const DType score_dtype = check_float("prune_topk", "score", score);
  check_last_dim("prune_topk", "score", score);
  check_same_device("prune_topk", "x", x, "score", score);
  TopkRows& rows = call.args.rows;
  rows = call.prune.rows;
  rows.score = score.const_data_ptr();
  if (!rows.cu_seqlens) rows.score_stride.batch = score.stride(0);
  rows.dtype = score_dtype;
  for (const RowTensor& tensor : call.prune.tensors) call.args.tensors[call.args.num_tensors++] = tensor;
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
  const Call call =
      prepare(x, score, {"prune_topk", "k", k, keep_mask, drop_mask, std::nullopt, 0, {}, 0, 0, kPruneTopkMaxTensors});
  run(call.args, x);
  return {call.prune.kept[0], call.prune.kept_idx};
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> packed(const Tensor& x, const Tensor& score, int64_t k,
                                                               const OptTensor& keep_mask, const OptTensor& drop_mask,
                                                               const OptTensor& cu_seqlens, int64_t max_seqlen,
                                                               const std::optional<std::vector<Tensor>>& others,
                                                               int64_t keep_first, int64_t keep_last) {
  const std::vector<Tensor> companions = others ? *others : std::vector<Tensor>{};
  Call call = prepare(x, score,
                      {"prune_topk", "k", k, keep_mask, drop_mask, cu_seqlens, max_seqlen, companions, keep_first,
                       keep_last, kPruneTopkMaxTensors});
  Tensor num_kept = new_empty(x, {call.args.rows.num_rows}, ScalarType::Int);
  call.args.rows.num_kept = static_cast<int32_t*>(num_kept.mutable_data_ptr());
  run(call.args, x);
  const std::vector<Tensor>& kept = call.prune.kept;
  return {kept[0], call.prune.kept_idx, num_kept, {kept.begin() + 1, kept.end()}};
}

// Sizes: batch_size, num_tokens, dim, k, element_size.
Plan plan_of_sizes(const PlanSizes& sizes) {
  Plan plan;
  plan_prune_topk(plan, sizes["batch_size"], sizes["num_tokens"], sizes["k"], sizes["dim"] * sizes["element_size"]);
  return plan;
}
TOKRED_PLAN(prune_topk, plan_of_sizes)

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

void plan_prune_topk(Plan& plan, int64_t batch_size, int64_t max_seqlen, int64_t k, int64_t row_bytes) {
  const PruneTopkPolicy policy = choose_policy(max_seqlen, k);
  if (policy.fused) {
    const int64_t copies = prune_topk_splits(batch_size, k, row_bytes);
    plan.launches.push_back({"select_and_copy", {batch_size * copies}, policy.threads});
  } else {
    plan_topk_rows(plan, policy.select, batch_size);
    plan.launches.push_back({"copy", {ceil_div<int64_t>(batch_size * k * row_bytes, 16384)}, 256});
  }
}

}  // namespace tokred
