// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/block_summary.h"

#include <string>

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "block_summary";

struct Call {
  BlockSummaryArgs args;
  Tensor low, high;
};

Call prepare(const Tensor& k, int64_t block_size, const OptTensor& kv_lens, const OptTensor& cu_seqlens,
             int64_t max_seqlen, const std::string& reduce) {
  BlockSummaryArgs a{};
  const bool packed = cu_seqlens.has_value();
  TOKRED_CHECK(k.dim() == (packed ? 3 : 4), "block_summary: expected k of shape ",
               packed ? "[total_tokens, num_kv_heads, head_dim] (with cu_seqlens)"
                      : "[batch_size, num_kv_heads, kv_len, head_dim]",
               ", got ", shape_of(k));
  a.dtype = check_float(kOp, "k", k);
  check_last_dim(kOp, "k", k);
  TOKRED_CHECK(block_size >= 1, "block_summary: expected block_size >= 1, got ", block_size);
  TOKRED_CHECK(reduce == "mean" || reduce == "minmax", "block_summary: expected reduce to be mean or minmax, got ",
               reduce);
  TOKRED_CHECK(packed || max_seqlen == 0, "block_summary: expected cu_seqlens with max_seqlen, got none");
  a.k = k.const_data_ptr();
  a.num_heads = k.size(1);
  a.dim = k.size(packed ? 2 : 3);
  a.kv_len = k.size(packed ? 0 : 2);
  a.k_batch = packed ? 0 : k.stride(0);
  a.k_head = k.stride(1);
  a.k_token = k.stride(packed ? 0 : 2);
  if (packed) {
    TOKRED_CHECK(!kv_lens, "block_summary: expected kv_lens or cu_seqlens, got both");
    check_cu_seqlens(kOp, *cu_seqlens, "k", k);
    check_int32_range(kOp, "total_tokens", a.kv_len);
    a.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
    a.batch_size = cu_seqlens->size(0) - 1;
    a.max_seqlen = max_seqlen;
    TOKRED_CHECK(max_seqlen >= 0 && max_seqlen <= a.kv_len, "block_summary: expected max_seqlen in [0, ", a.kv_len,
                 "], got ", max_seqlen);
  } else {
    a.batch_size = k.size(0);
    a.max_seqlen = a.kv_len;
    a.kv_lens = check_kv_lens(kOp, "k", k, kv_lens);
  }
  a.num_blocks = a.max_seqlen / block_size + (a.max_seqlen % block_size != 0);
  a.block_size = block_size;
  const bool minmax = reduce == "minmax";
  Tensor low = new_empty(k, {a.batch_size, a.num_heads, a.num_blocks, a.dim}, k.scalar_type());
  Tensor high = new_empty(k, {minmax ? a.batch_size : 0, a.num_heads, a.num_blocks, a.dim}, k.scalar_type());
  a.low = low.mutable_data_ptr();
  a.high = minmax ? high.mutable_data_ptr() : nullptr;
  return {a, low, high};
}

using Run = void (*)(const BlockSummaryArgs& args, const Tensor& k);

void run_cpu(const BlockSummaryArgs& args, const Tensor&) { block_summary_cpu(args); }

[[maybe_unused]] void run_cuda(const BlockSummaryArgs& args, const Tensor& k) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(k);
  check_cuda(kOp, block_summary_cuda(args, device.stream()));
#endif
}

template <Run run>
std::tuple<Tensor, Tensor> block_summary(const Tensor& k, int64_t block_size, const OptTensor& kv_lens,
                                         const OptTensor& cu_seqlens, int64_t max_seqlen, std::string reduce) {
  Call call = prepare(k, block_size, kv_lens, cu_seqlens, max_seqlen, reduce);
  if (call.args.num_rows() > 0 && call.args.dim > 0) run(call.args, k);
  return {call.low, call.high};
}

// Sizes: batch_size, num_kv_heads, num_blocks, head_dim, element_size; rows that are aligned.
Plan plan_block_summary(const PlanSizes& s) {
  const int64_t loads = s["head_dim"] * s.get("element_size", 2) / 16;
  const int64_t threads = s["batch_size"] * s["num_kv_heads"] * s["num_blocks"] * loads;
  Plan plan;
  plan.launches.push_back(
      {"block_summary_kernel", {ceil_div<int64_t>(threads, kBlockSummaryThreads), 1, 1}, kBlockSummaryThreads});
  return plan;
}
TOKRED_PLAN(block_summary, plan_block_summary)

TOKRED_SCHEMA(m) {
  m.def(
      "block_summary(Tensor k, SymInt block_size, Tensor? kv_lens=None, Tensor? cu_seqlens=None,"
      " SymInt max_seqlen=0, str reduce=\"mean\") -> (Tensor low, Tensor high)");
}
TOKRED_IMPL_CPU(m) { m.impl("block_summary", TORCH_BOX(&block_summary<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("block_summary", TORCH_BOX(&block_summary<run_cuda>)); }

}  // namespace
}  // namespace tokred
