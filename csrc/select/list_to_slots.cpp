// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/list_to_slots.h"

#include "torch/glue.h"

namespace tokred {
namespace {

struct Call {
  ListToSlotsArgs args;
  Tensor slots;
};

Call prepare(const Tensor& kept_idx, const Tensor& page_table, int64_t page_size, const OptTensor& kv_lens) {
  TOKRED_CHECK(kept_idx.dim() == 2 || kept_idx.dim() == 3,
               "list_to_slots: expected kept_idx of shape [batch_size, k] or [batch_size, num_heads, k], got ",
               shape_of(kept_idx));
  TOKRED_CHECK(page_table.dim() == 2 || page_table.dim() == kept_idx.dim(),
               "list_to_slots: expected page_table of shape [batch_size, max_pages]",
               kept_idx.dim() == 3 ? " or [batch_size, num_kv_heads, max_pages]" : "", ", got ", shape_of(page_table));
  ListToSlotsArgs args{};
  args.kept_idx = check_index("list_to_slots", "kept_idx", kept_idx);
  args.batch_size = kept_idx.size(0);
  args.num_heads = kept_idx.dim() == 3 ? kept_idx.size(1) : 1;
  args.k = kept_idx.size(kept_idx.dim() - 1);
  const bool per_head = page_table.dim() == 3;
  args.num_tables = per_head ? page_table.size(1) : 1;
  args.max_pages = page_table.size(page_table.dim() - 1);
  args.page_size = page_size;
  args.page_shift = page_size > 0 && (page_size & (page_size - 1)) == 0 ? __builtin_ctzll(page_size) : -1;
  TOKRED_CHECK(page_table.size(0) == args.batch_size, "list_to_slots: expected page_table with batch_size ",
               args.batch_size, ", got ", shape_of(page_table));
  TOKRED_CHECK(args.num_tables > 0 ? args.num_heads % args.num_tables == 0 : args.num_heads == 0,
               "list_to_slots: expected num_heads to be a multiple of num_kv_heads, got ", args.num_heads, " and ",
               args.num_tables);
  TOKRED_CHECK(page_size >= 1, "list_to_slots: expected page_size >= 1, got ", page_size);
  check_int32_range("list_to_slots", "page_size", page_size);
  check_int32_range("list_to_slots", "max_pages", args.max_pages);
  check_dtype("list_to_slots", "page_table", page_table, ScalarType::Int);
  check_contiguous("list_to_slots", "page_table", page_table);
  check_same_device("list_to_slots", "kept_idx", kept_idx, "page_table", page_table);
  if (kv_lens) {
    std::vector<int64_t> shape{args.batch_size};
    if (per_head) shape.push_back(args.num_tables);
    check_shape("list_to_slots", "kv_lens", *kv_lens, shape, per_head ? "[batch_size, num_kv_heads]" : "[batch_size]");
    check_dtype("list_to_slots", "kv_lens", *kv_lens, ScalarType::Int);
    check_contiguous("list_to_slots", "kv_lens", *kv_lens);
    check_same_device("list_to_slots", "kept_idx", kept_idx, "kv_lens", *kv_lens);
  }
  args.page_table = static_cast<const int32_t*>(page_table.const_data_ptr());
  args.kv_lens = data_or_null<int32_t>(kv_lens);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < kept_idx.dim(); ++d) shape.push_back(kept_idx.size(d));
  Call call{args, new_empty(kept_idx, shape, ScalarType::Int)};
  call.args.slots = static_cast<int32_t*>(call.slots.mutable_data_ptr());
  return call;
}

Tensor on_cpu(const Tensor& kept_idx, const Tensor& page_table, int64_t page_size, const OptTensor& kv_lens) {
  Call call = prepare(kept_idx, page_table, page_size, kv_lens);
  list_to_slots_cpu(call.args);
  return call.slots;
}

[[maybe_unused]] Tensor on_cuda(const Tensor& kept_idx, const Tensor& page_table, int64_t page_size,
                                const OptTensor& kv_lens) {
  Call call = prepare(kept_idx, page_table, page_size, kv_lens);
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(kept_idx);
  check_cuda("list_to_slots", list_to_slots_cuda(call.args, device.stream()));
#endif
  return call.slots;
}

// Sizes: num_lists, k.
Plan plan_list_to_slots(const PlanSizes& sizes) {
  const int64_t lists = sizes["num_lists"], k = sizes["k"];
  Plan plan;
  plan.launches.push_back({"slots", {lists * ceil_div<int64_t>(k, kListToSlotsThreads)}, kListToSlotsThreads});
  return plan;
}
TOKRED_PLAN(list_to_slots, plan_list_to_slots)

TOKRED_SCHEMA(m) {
  m.def("list_to_slots(Tensor kept_idx, Tensor page_table, SymInt page_size, Tensor? kv_lens=None) -> Tensor slots");
}
TOKRED_IMPL_CPU(m) { m.impl("list_to_slots", TORCH_BOX(&on_cpu)); }
TOKRED_IMPL_CUDA(m) { m.impl("list_to_slots", TORCH_BOX(&on_cuda)); }

}  // namespace
}  // namespace tokred
