// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/gather_tokens.h"

#include "torch/glue.h"
#include "torch/glue_rows.h"

namespace tokred {
namespace {

constexpr const char* kOp = "gather_tokens";
using Run = void (*)(const GatherTokensArgs& args, const Tensor& like);

// Tokens kept at both ends, around the listed ones.
struct Spans {
  int64_t first = 0, last = 0;
};

// One tensor of the call, checked: its geometry without addresses, and the shape of its output.
struct Checked {
  RowTensor rows;
  int64_t num_tokens;
  std::vector<int64_t> out_shape;
};

std::vector<Checked> check(const std::vector<Tensor>& tensors, const Tensor& kept_idx, const std::vector<int64_t>& dims,
                           const Spans& spans) {
  (void)check_lists(kOp, kept_idx);
  TOKRED_CHECK(dims.size() == tensors.size(), "gather_tokens: expected one token dimension per tensor (",
               tensors.size(), "), got ", dims.size());
  TOKRED_CHECK(spans.first >= 0 && spans.last >= 0, "gather_tokens: expected keep_first and keep_last >= 0, got ",
               spans.first, " and ", spans.last);
  const int64_t k = spans.first + kept_idx.size(kept_idx.dim() - 1) + spans.last;
  std::vector<Checked> checked;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    const RowTensor rows = check_listed_rows(kOp, concat("tensors[", i, "]"), x, dims[i], "num_tokens", kept_idx);
    const int64_t num_tokens = x.size(dims[i]);
    TOKRED_CHECK(num_tokens >= spans.first + spans.last, "gather_tokens: expected keep_first + keep_last in [0, ",
                 num_tokens, "], the tokens of tensors[", i, "], got ", spans.first, " + ", spans.last);
    checked.push_back({rows, num_tokens, with_tokens(x, dims[i], k)});
  }
  return checked;
}

template <Run run>
void fill(const std::vector<Checked>& checked, const Tensor& kept_idx, const Spans& spans,
          const std::vector<Tensor>& out) {
  GatherTokensArgs args{};
  args.kept_idx = {kept_idx.const_data_ptr(), kept_idx.scalar_type() == ScalarType::Long};
  args.list_heads = kept_idx.dim() == 3 ? kept_idx.size(1) : 1;
  args.batch_size = kept_idx.size(0);
  args.list_len = kept_idx.size(kept_idx.dim() - 1);
  args.keep_first = spans.first;
  args.keep_last = spans.last;
  args.k = spans.first + args.list_len + spans.last;
  for (size_t i = 0; i < checked.size(); ++i) {
    RowTensor& rows = args.tensors[args.num_tensors];
    rows = checked[i].rows;
    rows.dst = static_cast<char*>(out[i].mutable_data_ptr());
    args.num_tokens[args.num_tensors++] = checked[i].num_tokens;
    if (args.num_tensors == kGatherMaxTensors || i + 1 == checked.size()) {
      run(args, kept_idx);
      args.num_tensors = 0;
    }
  }
}

template <Run run>
std::vector<Tensor> gather(const std::vector<Tensor>& tensors, const Tensor& kept_idx, const std::vector<int64_t>& dims,
                           const Spans& spans) {
  const std::vector<Checked> checked = check(tensors, kept_idx, dims, spans);
  std::vector<Tensor> out;
  for (size_t i = 0; i < tensors.size(); ++i) out.push_back(new_empty(tensors[i], checked[i].out_shape));
  fill<run>(checked, kept_idx, spans, out);
  return out;
}

template <Run run>
std::vector<Tensor> plain(const std::vector<Tensor>& tensors, const Tensor& kept_idx,
                          const std::vector<int64_t>& dims) {
  return gather<run>(tensors, kept_idx, dims, {});
}

template <Run run>
std::vector<Tensor> with_spans(const std::vector<Tensor>& tensors, const Tensor& kept_idx,
                               const std::vector<int64_t>& dims, int64_t keep_first, int64_t keep_last) {
  return gather<run>(tensors, kept_idx, dims, {keep_first, keep_last});
}

template <Run run>
void into(const std::vector<Tensor>& tensors, const Tensor& kept_idx, const std::vector<int64_t>& dims,
          int64_t keep_first, int64_t keep_last, const std::vector<Tensor>& out) {
  const Spans spans{keep_first, keep_last};
  const std::vector<Checked> checked = check(tensors, kept_idx, dims, spans);
  TOKRED_CHECK(out.size() == tensors.size(), "gather_tokens: expected one out tensor per tensor (", tensors.size(),
               "), got ", out.size());
  for (size_t i = 0; i < out.size(); ++i) {
    check_out(kOp, concat("out[", i, "]"), out[i], checked[i].out_shape, "of the gathered tensor", tensors[i],
              kept_idx);
  }
  fill<run>(checked, kept_idx, spans, out);
}

void run_cpu(const GatherTokensArgs& args, const Tensor&) { gather_tokens_cpu(args); }
[[maybe_unused]] void run_cuda(const GatherTokensArgs& args, const Tensor& like) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(like);
  check_cuda(kOp, gather_tokens_cuda(args, device.stream()));
#endif
}

// Sizes: rows (kept rows of all tensors and heads), row_bytes.
Plan plan_gather_tokens(const PlanSizes& sizes) {
  const int64_t bytes = sizes["rows"] * sizes["row_bytes"];
  Plan plan;
  plan.launches.push_back({"gather_tokens", {ceil_div<int64_t>(bytes, 16384)}, 256});
  return plan;
}
TOKRED_PLAN(gather_tokens, plan_gather_tokens)

TOKRED_SCHEMA(m) {
  m.def("gather_tokens(Tensor[] tensors, Tensor kept_idx, int[] dims) -> Tensor[]");
  m.def(
      "gather_tokens.spans(Tensor[] tensors, Tensor kept_idx, int[] dims, SymInt keep_first, SymInt keep_last)"
      " -> Tensor[]");
  m.def(
      "gather_tokens.out(Tensor[] tensors, Tensor kept_idx, int[] dims, SymInt keep_first=0, SymInt keep_last=0, *,"
      " Tensor(a!)[] out) -> ()");
}
TOKRED_IMPL_CPU(m) {
  m.impl("gather_tokens", TORCH_BOX(&plain<run_cpu>));
  m.impl("gather_tokens.spans", TORCH_BOX(&with_spans<run_cpu>));
  m.impl("gather_tokens.out", TORCH_BOX(&into<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("gather_tokens", TORCH_BOX(&plain<run_cuda>));
  m.impl("gather_tokens.spans", TORCH_BOX(&with_spans<run_cuda>));
  m.impl("gather_tokens.out", TORCH_BOX(&into<run_cuda>));
}

}  // namespace
}  // namespace tokred
