// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "torch/glue_prune.h"

namespace tokred {

std::vector<int64_t> prune_score_shape(const PruneCall& call) {
  if (call.rows.cu_seqlens) return {call.rows.num_tokens};
  return {call.rows.num_rows, call.rows.num_tokens};
}
const char* prune_score_meaning(const PruneCall& call) {
  return call.rows.cu_seqlens ? "[total_tokens]" : "[batch_size, num_tokens]";
}

PruneCall check_prune(const Tensor& x, const PruneOptions& o) {
  const char* op = o.op;
  const bool packed = o.cu_seqlens.has_value();
  const int64_t lead = packed ? 1 : 2;
  TOKRED_CHECK(x.dim() == lead + 1, op, ": expected x of shape ",
               packed ? "[total_tokens, dim] (with cu_seqlens)" : "[batch_size, num_tokens, dim]", ", got ",
               shape_of(x));
  const int64_t num_tokens = x.size(lead - 1);
  if (packed) {
    check_cu_seqlens(op, *o.cu_seqlens, "x", x);
    TOKRED_CHECK(o.max_seqlen >= 0 && o.max_seqlen <= num_tokens, op, ": expected max_seqlen in [0, ", num_tokens,
                 "], got ", o.max_seqlen);
  }
  check_int32_range(op, "num_tokens", num_tokens);
  if (packed) {
    TOKRED_CHECK(o.count >= 0, op, ": expected ", o.count_name, " >= 0, got ", o.count);
    check_int32_range(op, o.count_name, o.count);
  } else {
    TOKRED_CHECK(o.count >= 0 && o.count <= num_tokens, op, ": expected ", o.count_name, " in [0, ", num_tokens,
                 "], got ", o.count);
  }
  TOKRED_CHECK(o.keep_first >= 0, op, ": expected keep_first >= 0, got ", o.keep_first);
  TOKRED_CHECK(o.keep_last >= 0, op, ": expected keep_last >= 0, got ", o.keep_last);
  TOKRED_CHECK(static_cast<int>(o.others.size()) < o.max_tensors, op, ": expected at most ", o.max_tensors - 1,
               " companions in others, got ", o.others.size());

  const int64_t batch_size = packed ? o.cu_seqlens->size(0) - 1 : x.size(0);
  PruneCall call{{}, {}, new_empty(x, {batch_size, o.count}, ScalarType::Long), {}};
  TopkRows& rows = call.rows;
  rows.cu_seqlens = data_or_null<int32_t>(o.cu_seqlens);
  rows.kept_idx = static_cast<int64_t*>(call.kept_idx.mutable_data_ptr());
  rows.num_rows = batch_size;
  rows.num_heads = 1;
  rows.num_tokens = num_tokens;
  rows.max_seqlen = packed ? o.max_seqlen : num_tokens;
  rows.k = o.count;
  rows.keep_first = o.keep_first;
  rows.keep_last = o.keep_last;
  if (!packed) rows.keep_stride.batch = rows.drop_stride.batch = num_tokens;
  const auto mask = [&](const char* name, const OptTensor& mask) -> const uint8_t* {
    if (!mask) return nullptr;
    check_dtype(op, name, *mask, ScalarType::Bool);
    check_same_device(op, "x", x, name, *mask);
    check_shape(op, name, *mask, prune_score_shape(call), prune_score_meaning(call));
    check_contiguous(op, name, *mask);
    return static_cast<const uint8_t*>(mask->const_data_ptr());
  };
  rows.keep_mask = mask("keep_mask", o.keep_mask);
  rows.drop_mask = mask("drop_mask", o.drop_mask);

  for (size_t i = 0; i <= o.others.size(); ++i) {
    const Tensor& tensor = i == 0 ? x : o.others[i - 1];
    const std::string name = i == 0 ? "x" : concat("others[", i - 1, "]");
    if (i > 0) {
      check_same_device(op, "x", x, name.c_str(), tensor);
      bool same = tensor.dim() >= lead;
      for (int64_t d = 0; same && d < lead; ++d) same = tensor.size(d) == x.size(d);
      TOKRED_CHECK(same, op, ": expected ", name, " of shape ",
                   packed ? "[total_tokens, ...]" : "[batch_size, num_tokens, ...]", " with the sizes of x ",
                   shape_of(x), ", got ", shape_of(tensor));
    }
    std::vector<int64_t> shape{batch_size, o.count};
    for (int64_t d = lead; d < tensor.dim(); ++d) shape.push_back(tensor.size(d));
    call.kept.push_back(new_empty(tensor, shape));
    call.tensors.push_back(check_rows(op, name, tensor, lead - 1));
    call.tensors.back().dst = static_cast<char*>(call.kept.back().mutable_data_ptr());
  }
  return call;
}

}  // namespace tokred
