// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/gather_tokens.h"

#include "torch/glue.h"

namespace tokred {
namespace {

using Run = void (*)(const GatherTokensArgs& args, const Tensor& like);

// One tensor of the call, checked: its geometry without addresses, and the shape of its output.
struct Checked {
  RowTensor rows;
  int64_t num_tokens;
  std::vector<int64_t> out_shape;
};

Checked check_tensor(const std::string& name, const Tensor& x, int64_t dim, const Tensor& kept_idx) {
  const bool per_head = kept_idx.dim() == 3;
  TOKRED_CHECK(dim == 1 || dim == 2, "gather_tokens: expected the token dimension of ", name, " to be 1 or 2, got ",
               dim);
  TOKRED_CHECK(!per_head || dim == 2, "gather_tokens: expected ", name,
               " of shape [batch_size, num_heads, num_tokens, ...] for a list per head, got token dimension ", dim);
  TOKRED_CHECK(x.dim() > dim, "gather_tokens: expected ", name, " with more than ", dim, " dimensions, got shape ",
               shape_of(x));
  TOKRED_CHECK(x.size(0) == kept_idx.size(0) && (!per_head || x.size(1) == kept_idx.size(1)),
               "gather_tokens: expected ", name, " of shape ",
               dim == 2 ? "[batch_size, num_heads, num_tokens, ...]" : "[batch_size, num_tokens, ...]",
               " with the leading sizes of kept_idx ", shape_of(kept_idx), ", got ", shape_of(x));
  check_same_device("gather_tokens", "kept_idx", kept_idx, name.c_str(), x);
  int64_t row = 1;
  for (int64_t d = x.dim() - 1; d > dim; --d) {
    TOKRED_CHECK(x.size(d) == 1 || x.stride(d) == row || x.numel() == 0, "gather_tokens: expected ", name,
                 " contiguous after its token dimension, got strides ", strides_of(x));
    row *= x.size(d);
  }
  Checked checked;
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  checked.rows.src = static_cast<const char*>(x.const_data_ptr());
  checked.rows.row_bytes = row * bytes;
  checked.rows.num_heads = dim == 2 ? x.size(1) : 1;
  checked.rows.src_batch = x.stride(0) * bytes;
  checked.rows.src_head = dim == 2 ? x.stride(1) * bytes : 0;
  checked.rows.src_token = x.stride(dim) * bytes;
  checked.num_tokens = x.size(dim);
  for (int64_t d = 0; d < x.dim(); ++d) {
    checked.out_shape.push_back(d == dim ? kept_idx.size(kept_idx.dim() - 1) : x.size(d));
  }
  return checked;
}

std::vector<Checked> check(const std::vector<Tensor>& tensors, const Tensor& kept_idx,
                           const std::vector<int64_t>& dims) {
  TOKRED_CHECK(kept_idx.dim() == 2 || kept_idx.dim() == 3,
               "gather_tokens: expected kept_idx of shape [batch_size, k] or [batch_size, num_heads, k], got ",
               shape_of(kept_idx));
  (void)check_index("gather_tokens", "kept_idx", kept_idx);
  TOKRED_CHECK(dims.size() == tensors.size(), "gather_tokens: expected one token dimension per tensor (",
               tensors.size(), "), got ", dims.size());
  std::vector<Checked> checked;
  for (size_t i = 0; i < tensors.size(); ++i) {
    checked.push_back(check_tensor(concat("tensors[", i, "]"), tensors[i], dims[i], kept_idx));
  }
  return checked;
}

template <Run run>
void fill(const std::vector<Checked>& checked, const Tensor& kept_idx, const std::vector<Tensor>& out) {
  GatherTokensArgs args{};
  args.kept_idx = {kept_idx.const_data_ptr(), kept_idx.scalar_type() == ScalarType::Long};
  args.list_heads = kept_idx.dim() == 3 ? kept_idx.size(1) : 1;
  args.batch_size = kept_idx.size(0);
  args.k = kept_idx.size(kept_idx.dim() - 1);
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
std::vector<Tensor> functional(const std::vector<Tensor>& tensors, const Tensor& kept_idx,
                               const std::vector<int64_t>& dims) {
  const std::vector<Checked> checked = check(tensors, kept_idx, dims);
  std::vector<Tensor> out;
  for (size_t i = 0; i < tensors.size(); ++i) out.push_back(new_empty(tensors[i], checked[i].out_shape));
  fill<run>(checked, kept_idx, out);
  return out;
}

template <Run run>
void into(const std::vector<Tensor>& tensors, const Tensor& kept_idx, const std::vector<int64_t>& dims,
          const std::vector<Tensor>& out) {
  const std::vector<Checked> checked = check(tensors, kept_idx, dims);
  TOKRED_CHECK(out.size() == tensors.size(), "gather_tokens: expected one out tensor per tensor (", tensors.size(),
               "), got ", out.size());
  for (size_t i = 0; i < out.size(); ++i) {
    const std::string name = concat("out[", i, "]");
    check_shape("gather_tokens", name.c_str(), out[i], checked[i].out_shape, "of the gathered tensor");
    TOKRED_CHECK(out[i].scalar_type() == tensors[i].scalar_type(), "gather_tokens: expected ", name, " of dtype ",
                 dtype_of(tensors[i]), ", got ", dtype_of(out[i]));
    check_same_device("gather_tokens", "kept_idx", kept_idx, name.c_str(), out[i]);
    check_contiguous("gather_tokens", name.c_str(), out[i]);
  }
  fill<run>(checked, kept_idx, out);
}

void run_cpu(const GatherTokensArgs& args, const Tensor&) { gather_tokens_cpu(args); }
[[maybe_unused]] void run_cuda(const GatherTokensArgs& args, const Tensor& like) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(like);
  check_cuda("gather_tokens", gather_tokens_cuda(args, device.stream()));
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
  m.def("gather_tokens.out(Tensor[] tensors, Tensor kept_idx, int[] dims, *, Tensor(a!)[] out) -> ()");
}
TOKRED_IMPL_CPU(m) {
  m.impl("gather_tokens", TORCH_BOX(&functional<run_cpu>));
  m.impl("gather_tokens.out", TORCH_BOX(&into<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("gather_tokens", TORCH_BOX(&functional<run_cuda>));
  m.impl("gather_tokens.out", TORCH_BOX(&into<run_cuda>));
}

}  // namespace
}  // namespace tokred
