// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "torch/glue_scores.h"

namespace tokred {

std::vector<int64_t> with_last(std::vector<int64_t> shape, int64_t last) {
  shape.push_back(last);
  return shape;
}

RowStrides strides_between_rows(const Tensor& x, bool packed) {
  const bool heads = x.dim() == (packed ? 2 : 3);
  return {packed ? 0 : x.stride(0), heads ? x.stride(x.dim() - 2) : 0};
}

RowsCall check_scores(const char* op, const Tensor& score, const OptTensor& cu_seqlens, int64_t max_seqlen) {
  const bool packed = cu_seqlens.has_value();
  TOKRED_CHECK(packed ? score.dim() == 1 || score.dim() == 2 : score.dim() == 2 || score.dim() == 3, op,
               ": expected score of shape ",
               packed ? "[total_tokens] or [num_heads, total_tokens] (with cu_seqlens)"
                      : "[batch_size, num_tokens] or [batch_size, num_heads, num_tokens]",
               ", got ", shape_of(score));
  const int64_t num_tokens = score.size(score.dim() - 1);
  const bool heads = score.dim() == (packed ? 2 : 3);
  const int64_t num_heads = heads ? score.size(score.dim() - 2) : 1;
  RowsCall call{};
  TopkRows& args = call.args;
  args.dtype = check_float(op, "score", score);
  check_last_dim(op, "score", score);
  check_int32_range(op, "num_tokens", num_tokens);
  if (packed) {
    check_cu_seqlens(op, *cu_seqlens, "score", score);
    TOKRED_CHECK(max_seqlen >= 0 && max_seqlen <= num_tokens, op, ": expected max_seqlen in [0, ", num_tokens,
                 "], got ", max_seqlen);
  }
  const int64_t batch_size = packed ? cu_seqlens->size(0) - 1 : score.size(0);
  call.packed = packed;
  call.lead = {batch_size};
  if (heads) call.lead.push_back(num_heads);
  args.score = score.const_data_ptr();
  args.score_stride = strides_between_rows(score, packed);
  args.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  args.num_rows = batch_size * num_heads;
  args.num_heads = num_heads > 0 ? num_heads : 1;
  args.num_tokens = num_tokens;
  args.max_seqlen = packed ? max_seqlen : num_tokens;
  check_int32_range(op, "batch_size * num_heads", args.num_rows);
  return call;
}

void check_like_score(const char* op, const char* name, const Tensor& x, const Tensor& score) {
  check_same_device(op, "score", score, name, x);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < score.dim(); ++i) shape.push_back(score.size(i));
  check_shape(op, name, x, shape, "of score");
  check_last_dim(op, name, x);
}

void check_masks(const char* op, const OptTensor& keep_mask, const OptTensor& drop_mask, const Tensor& score,
                 RowsCall& call) {
  const auto check = [&](const char* name, const OptTensor& mask, RowStrides& strides) -> const uint8_t* {
    if (!mask) return nullptr;
    check_dtype(op, name, *mask, ScalarType::Bool);
    check_like_score(op, name, *mask, score);
    strides = strides_between_rows(*mask, call.packed);
    return static_cast<const uint8_t*>(mask->const_data_ptr());
  };
  call.args.keep_mask = check("keep_mask", keep_mask, call.args.keep_stride);
  call.args.drop_mask = check("drop_mask", drop_mask, call.args.drop_stride);
}

void check_length(const char* op, const char* name, int64_t k, const RowsCall& call) {
  if (call.packed) {
    TOKRED_CHECK(k >= 0, op, ": expected ", name, " >= 0, got ", k);
    check_int32_range(op, name, k);
  } else {
    TOKRED_CHECK(k >= 0 && k <= call.args.num_tokens, op, ": expected ", name, " in [0, ", call.args.num_tokens,
                 "], got ", k);
  }
}

void check_windows(const char* op, int64_t keep_first, int64_t keep_last, RowsCall& call) {
  TOKRED_CHECK(keep_first >= 0, op, ": expected keep_first >= 0, got ", keep_first);
  TOKRED_CHECK(keep_last >= 0, op, ": expected keep_last >= 0, got ", keep_last);
  call.args.keep_first = keep_first;
  call.args.keep_last = keep_last;
}

void check_order(const char* op, const std::string& order, RowsCall& call) {
  TOKRED_CHECK(order == "index" || order == "score", op, ": expected order 'index' or 'score', got '", order, "'");
  call.args.by_score = order == "score";
}

void check_per_row(const char* op, const char* name, const Tensor& x, const Tensor& score, const RowsCall& call) {
  check_shape(op, name, x, call.lead, call.lead.size() == 2 ? "[batch_size, num_heads]" : "[batch_size]");
  check_contiguous(op, name, x);
  check_same_device(op, "score", score, name, x);
}

}  // namespace tokred
