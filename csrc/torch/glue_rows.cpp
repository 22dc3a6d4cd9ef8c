// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "torch/glue_rows.h"

namespace tokred {

RowTensor check_rows(const char* op, const std::string& name, const Tensor& x, int64_t dim) {
  int64_t row = 1;
  for (int64_t d = x.dim() - 1; d > dim; --d) {
    TOKRED_CHECK(x.size(d) == 1 || x.stride(d) == row || x.numel() == 0, op, ": expected ", name,
                 " contiguous after its token dimension, got strides ", strides_of(x));
    row *= x.size(d);
  }
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  RowTensor t;
  t.src = static_cast<const char*>(x.const_data_ptr());
  t.row_bytes = row * bytes;
  t.num_heads = dim == 2 ? x.size(1) : 1;
  t.src_batch = dim > 0 ? x.stride(0) * bytes : 0;
  t.src_head = dim == 2 ? x.stride(1) * bytes : 0;
  t.src_token = x.stride(dim) * bytes;
  return t;
}

IndexPtr check_lists(const char* op, const Tensor& kept_idx) {
  TOKRED_CHECK(kept_idx.dim() == 2 || kept_idx.dim() == 3, op,
               ": expected kept_idx of shape [batch_size, k] or [batch_size, num_heads, k], got ", shape_of(kept_idx));
  return check_index(op, "kept_idx", kept_idx);
}

RowTensor check_listed_rows(const char* op, const std::string& name, const Tensor& x, int64_t dim, const char* tokens,
                            const Tensor& kept_idx) {
  const bool per_head = kept_idx.dim() == 3;
  const std::string by_head = concat("[batch_size, num_heads, ", tokens, ", ...]");
  TOKRED_CHECK(dim == 1 || dim == 2, op, ": expected the token dimension of ", name, " to be 1 or 2, got ", dim);
  TOKRED_CHECK(!per_head || dim == 2, op, ": expected ", name, " of shape ", by_head,
               " for a list per head, got token dimension ", dim);
  TOKRED_CHECK(x.dim() > dim, op, ": expected ", name, " with more than ", dim, " dimensions, got shape ", shape_of(x));
  TOKRED_CHECK(x.size(0) == kept_idx.size(0) && (!per_head || x.size(1) == kept_idx.size(1)), op, ": expected ", name,
               " of shape ", dim == 2 ? by_head : concat("[batch_size, ", tokens, ", ...]"),
               " with the leading sizes of kept_idx ", shape_of(kept_idx), ", got ", shape_of(x));
  check_same_device(op, "kept_idx", kept_idx, name.c_str(), x);
  return check_rows(op, name, x, dim);
}

std::vector<int64_t> with_tokens(const Tensor& x, int64_t dim, int64_t count) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(d == dim ? count : x.size(d));
  return shape;
}

void check_out(const char* op, const std::string& name, const Tensor& out, const std::vector<int64_t>& shape,
               const char* meaning, const Tensor& like, const Tensor& kept_idx) {
  check_shape(op, name.c_str(), out, shape, meaning);
  TOKRED_CHECK(out.scalar_type() == like.scalar_type(), op, ": expected ", name, " of dtype ", dtype_of(like), ", got ",
               dtype_of(out));
  check_same_device(op, "kept_idx", kept_idx, name.c_str(), out);
  check_contiguous(op, name.c_str(), out);
}

}  // namespace tokred
