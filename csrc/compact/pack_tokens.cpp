// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/pack_tokens.h"

#include "torch/glue.h"
#include "torch/glue_rows.h"

namespace tokred {
namespace {

constexpr const char* kOp = "pack_tokens";
using Run = void (*)(const PackTokensArgs& args, const Tensor& mask);

PackTensor check_tensor(size_t i, const Tensor& x, const Tensor& mask) {
  const std::string name = concat("tensors[", i, "]");
  const int64_t lead = mask.dim();
  bool same = x.dim() >= lead;
  for (int64_t d = 0; same && d < lead; ++d) same = x.size(d) == mask.size(d);
  TOKRED_CHECK(same, "pack_tokens: expected ", name, " of shape ",
               lead == 1 ? "[total_tokens, ...]" : "[batch_size, num_tokens, ...]", " with the sizes of mask ",
               shape_of(mask), ", got ", shape_of(x));
  check_same_device(kOp, "mask", mask, name.c_str(), x);
  PackTensor t;
  static_cast<RowTensor&>(t) = check_rows(kOp, name, x, lead - 1);
  const bool one_stride = lead == 1 || x.size(0) <= 1 || x.stride(0) == x.size(1) * x.stride(1);
  t.rows_per_batch = one_stride ? 0 : static_cast<int32_t>(x.size(1));
  return t;
}

PackTokensArgs prepare(const Tensor& mask, int64_t max_total, const OptTensor& cu_seqlens) {
  const bool packed = cu_seqlens.has_value();
  TOKRED_CHECK(mask.dim() == (packed ? 1 : 2), "pack_tokens: expected mask of shape ",
               packed ? "[total_tokens] (with cu_seqlens)" : "[batch_size, num_tokens]", ", got ", shape_of(mask));
  check_dtype(kOp, "mask", mask, ScalarType::Bool);
  check_contiguous(kOp, "mask", mask);
  check_int32_range(kOp, "the tokens of mask", mask.numel());
  TOKRED_CHECK(max_total >= 0 && max_total <= mask.numel(), "pack_tokens: expected max_total in [0, ", mask.numel(),
               "], got ", max_total);
  if (packed) check_cu_seqlens(kOp, *cu_seqlens, "mask", mask);
  PackTokensArgs args{};
  args.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  args.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  args.batch_size = packed ? cu_seqlens->size(0) - 1 : mask.size(0);
  args.num_tokens = packed ? 0 : mask.size(1);
  args.total_tokens = mask.numel();
  args.max_total = max_total;
  return args;
}

template <Run run>
std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> pack(const std::vector<Tensor>& tensors, const Tensor& mask,
                                                             int64_t max_total, const OptTensor& cu_seqlens) {
  PackTokensArgs args = prepare(mask, max_total, cu_seqlens);
  std::vector<PackTensor> checked;
  for (size_t i = 0; i < tensors.size(); ++i) checked.push_back(check_tensor(i, tensors[i], mask));
  std::vector<Tensor> packed;
  for (const Tensor& x : tensors) {
    std::vector<int64_t> shape{max_total};
    for (int64_t d = mask.dim(); d < x.dim(); ++d) shape.push_back(x.size(d));
    packed.push_back(new_empty(x, shape));
  }
  Tensor kept_rows = new_empty(mask, {max_total}, ScalarType::Long);
  Tensor cu_seqlens_kept = new_empty(mask, {args.batch_size + 1}, ScalarType::Int);
  Tensor num_kept = new_empty(mask, {args.batch_size}, ScalarType::Int);
  args.kept_rows = static_cast<int64_t*>(kept_rows.mutable_data_ptr());
  args.cu_seqlens_kept = static_cast<int32_t*>(cu_seqlens_kept.mutable_data_ptr());
  args.num_kept = static_cast<int32_t*>(num_kept.mutable_data_ptr());
  size_t i = 0;
  do {  // once without tensors, too
    args.num_tensors = 0;
    for (; i < packed.size() && args.num_tensors < kPackMaxTensors; ++i) {
      PackTensor& t = args.tensors[args.num_tensors++];
      t = checked[i];
      t.dst = static_cast<char*>(packed[i].mutable_data_ptr());
    }
    run(args, mask);
    args.rows_known = true;
  } while (i < packed.size());
  return {std::move(packed), std::move(kept_rows), std::move(cu_seqlens_kept), std::move(num_kept)};
}

void run_cpu(const PackTokensArgs& args, const Tensor&) { pack_tokens_cpu(args); }
[[maybe_unused]] void run_cuda(const PackTokensArgs& args, const Tensor& mask) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(mask);
  PackTokensArgs with_workspace = args;
  Tensor counts = new_empty(mask, {args.rows_known ? 0 : pack_chunks(args.total_tokens).count}, ScalarType::Int);
  with_workspace.chunk_counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  check_cuda(kOp, pack_tokens_cuda(with_workspace, device.stream()));
#endif
}

// Sizes: total_tokens, batch_size, max_total, row_bytes.
Plan plan_pack_tokens(const PlanSizes& sizes) {
  const int64_t chunks = pack_chunks(sizes["total_tokens"]).count;
  Plan plan;
  if (chunks > 1) plan.launches.push_back({"pack_count", {chunks}, kPackThreads});
  plan.launches.push_back(
      {"pack_rows", {chunks + std::max<int64_t>(1, ceil_div<int64_t>(sizes["batch_size"], 8))}, kPackThreads});
  plan.launches.push_back({"pack_copy", {ceil_div<int64_t>(sizes["max_total"] * sizes["row_bytes"], 16384)}, 256});
  return plan;
}
TOKRED_PLAN(pack_tokens, plan_pack_tokens)

TOKRED_SCHEMA(m) {
  m.def(
      "pack_tokens(Tensor[] tensors, Tensor mask, SymInt max_total, Tensor? cu_seqlens=None)"
      " -> (Tensor[] packed, Tensor kept_rows, Tensor cu_seqlens_kept, Tensor num_kept)");
}
TOKRED_IMPL_CPU(m) { m.impl("pack_tokens", TORCH_BOX(&pack<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("pack_tokens", TORCH_BOX(&pack<run_cuda>)); }

}  // namespace
}  // namespace tokred
