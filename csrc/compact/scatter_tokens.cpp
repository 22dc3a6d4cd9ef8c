// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/scatter_tokens.h"

#include "torch/glue.h"
#include "torch/glue_rows.h"

namespace tokred {
namespace {

constexpr const char* kOp = "scatter_tokens";
using Run = void (*)(const ScatterTokensArgs& args, const Tensor& like);
using OptTensors = std::optional<std::vector<Tensor>>;

struct Call {
  ScatterTokensArgs args;              // without tensors
  std::vector<ScatterTensor> tensors;  // without addresses of outputs
  std::vector<std::vector<int64_t>> out_shapes;
};

ScatterTensor check_tensor(size_t i, const Tensor& x, int64_t dim, const Tensor& kept_idx, const OptTensors& base,
                           const std::vector<int64_t>& out_shape, bool blend) {
  const std::string name = concat("tensors[", i, "]"), base_name = concat("base[", i, "]");
  ScatterTensor t;
  static_cast<RowTensor&>(t) = check_listed_rows(kOp, name, x, dim, "k", kept_idx);
  TOKRED_CHECK(x.size(dim) == kept_idx.size(kept_idx.dim() - 1), "scatter_tokens: expected ", name,
               " with a row per slot of kept_idx ", shape_of(kept_idx), ", got ", shape_of(x));
  if (blend) t.dtype = check_float(kOp, name.c_str(), x);
  if (base) {
    const Tensor& y = (*base)[i];
    check_shape(kOp, base_name.c_str(), y, out_shape, concat("of ", name, " with num_tokens for k").c_str());
    TOKRED_CHECK(y.scalar_type() == x.scalar_type(), "scatter_tokens: expected ", base_name, " of dtype ", dtype_of(x),
                 ", got ", dtype_of(y));
    check_same_device(kOp, "kept_idx", kept_idx, base_name.c_str(), y);
    const RowTensor rows = check_rows(kOp, base_name, y, dim);
    t.base = rows.src;
    t.base_batch = rows.src_batch;
    t.base_head = rows.src_head;
    t.base_token = rows.src_token;
  }
  return t;
}

Call prepare(const std::vector<Tensor>& tensors, const Tensor& kept_idx, const std::vector<int64_t>& dims,
             int64_t num_tokens, const OptTensors& base, double alpha, double beta) {
  Call call{};
  ScatterTokensArgs& args = call.args;
  args.kept_idx = check_lists(kOp, kept_idx);
  args.list_heads = kept_idx.dim() == 3 ? kept_idx.size(1) : 1;
  args.batch_size = kept_idx.size(0);
  args.k = kept_idx.size(kept_idx.dim() - 1);
  args.num_tokens = num_tokens;
  args.alpha = static_cast<float>(alpha);
  args.beta = static_cast<float>(beta);
  args.blend = alpha != 1 || beta != 0;
  TOKRED_CHECK(num_tokens >= 0, "scatter_tokens: expected num_tokens >= 0, got ", num_tokens);
  check_int32_range(kOp, "num_tokens", num_tokens);
  check_int32_range(kOp, "k", args.k);
  TOKRED_CHECK(dims.size() == tensors.size(), "scatter_tokens: expected one token dimension per tensor (",
               tensors.size(), "), got ", dims.size());
  TOKRED_CHECK(!base || base->size() == tensors.size(), "scatter_tokens: expected one base per tensor (",
               tensors.size(), "), got ", base ? base->size() : 0);
  TOKRED_CHECK(base || beta == 0, "scatter_tokens: expected a base with beta, got beta ", beta, " alone");
  for (size_t i = 0; i < tensors.size(); ++i) {
    call.out_shapes.push_back(with_tokens(tensors[i], dims[i], num_tokens));
    call.tensors.push_back(check_tensor(i, tensors[i], dims[i], kept_idx, base, call.out_shapes.back(), args.blend));
  }
  return call;
}

template <Run run>
Tensor fill(Call& call, const Tensor& kept_idx, const std::vector<Tensor>& out) {
  ScatterTokensArgs& args = call.args;
  std::vector<int64_t> shape = with_tokens(kept_idx, kept_idx.dim() - 1, args.num_tokens);
  Tensor slot_idx = new_empty(kept_idx, shape, ScalarType::Int);
  args.slot_idx = static_cast<int32_t*>(slot_idx.mutable_data_ptr());
  size_t i = 0;
  do {  // once without tensors, too: slot_idx is written
    args.num_tensors = 0;
    for (; i < out.size() && args.num_tensors < kScatterMaxTensors; ++i) {
      ScatterTensor& t = args.tensors[args.num_tensors++];
      t = call.tensors[i];
      t.dst = static_cast<char*>(out[i].mutable_data_ptr());
    }
    run(args, kept_idx);
    args.slots_known = true;
  } while (i < out.size());
  return slot_idx;
}

template <Run run>
std::tuple<std::vector<Tensor>, Tensor> functional(const std::vector<Tensor>& tensors, const Tensor& kept_idx,
                                                   const std::vector<int64_t>& dims, int64_t num_tokens,
                                                   const OptTensors& base, double alpha, double beta) {
  Call call = prepare(tensors, kept_idx, dims, num_tokens, base, alpha, beta);
  std::vector<Tensor> out;
  for (size_t i = 0; i < tensors.size(); ++i) out.push_back(new_empty(tensors[i], call.out_shapes[i]));
  Tensor slot_idx = fill<run>(call, kept_idx, out);
  return {std::move(out), std::move(slot_idx)};
}

template <Run run>
void into(const std::vector<Tensor>& tensors, const Tensor& kept_idx, const std::vector<int64_t>& dims,
          int64_t num_tokens, const OptTensors& base, double alpha, double beta, const std::vector<Tensor>& out) {
  Call call = prepare(tensors, kept_idx, dims, num_tokens, base, alpha, beta);
  TOKRED_CHECK(out.size() == tensors.size(), "scatter_tokens: expected one out tensor per tensor (", tensors.size(),
               "), got ", out.size());
  for (size_t i = 0; i < out.size(); ++i) {
    check_out(kOp, concat("out[", i, "]"), out[i], call.out_shapes[i], "of the restored tensor", tensors[i], kept_idx);
  }
  (void)fill<run>(call, kept_idx, out);
}

void run_cpu(const ScatterTokensArgs& args, const Tensor&) { scatter_tokens_cpu(args); }
[[maybe_unused]] void run_cuda(const ScatterTokensArgs& args, const Tensor& like) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(like);
  check_cuda(kOp, scatter_tokens_cuda(args, device.stream()));
#endif
}

// Sizes: lists, num_tokens, row_bytes (of all tensors and heads together, per token of a list).
Plan plan_scatter_tokens(const PlanSizes& sizes) {
  const int64_t lists = sizes["lists"], num_tokens = sizes["num_tokens"];
  Plan plan;
  plan.launches.push_back({"scatter_slots", {lists * ceil_div<int64_t>(num_tokens, 4096)}, 256});
  plan.launches.push_back({"scatter_tokens", {ceil_div<int64_t>(lists * num_tokens * sizes["row_bytes"], 16384)}, 256});
  return plan;
}
TOKRED_PLAN(scatter_tokens, plan_scatter_tokens)

TOKRED_SCHEMA(m) {
  m.def(
      "scatter_tokens(Tensor[] tensors, Tensor kept_idx, int[] dims, SymInt num_tokens, Tensor[]? base=None,"
      " float alpha=1.0, float beta=0.0) -> (Tensor[] restored, Tensor slot_idx)");
  m.def(
      "scatter_tokens.out(Tensor[] tensors, Tensor kept_idx, int[] dims, SymInt num_tokens, Tensor[]? base=None,"
      " float alpha=1.0, float beta=0.0, *, Tensor(a!)[] out) -> ()");
}
TOKRED_IMPL_CPU(m) {
  m.impl("scatter_tokens", TORCH_BOX(&functional<run_cpu>));
  m.impl("scatter_tokens.out", TORCH_BOX(&into<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("scatter_tokens", TORCH_BOX(&functional<run_cuda>));
  m.impl("scatter_tokens.out", TORCH_BOX(&into<run_cuda>));
}

}  // namespace
}  // namespace tokred
