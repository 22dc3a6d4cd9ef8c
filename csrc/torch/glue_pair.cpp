// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "torch/glue_pair.h"

namespace tokred {
namespace {

PairMetric parse_metric(const char* op, const std::string& metric) {
  if (metric == "cosine") return PairMetric::kCosine;
  if (metric == "dot") return PairMetric::kDot;
  TOKRED_CHECK(metric == "l2", op, ": expected metric \"cosine\", \"dot\" or \"l2\", got \"", metric, "\"");
  return PairMetric::kL2;
}

IndexPtr check_group(const char* op, const char* name, const Tensor& group, const Tensor& x,
                     const std::vector<int64_t>& shape, const char* meaning) {
  check_same_device(op, "x", x, name, group);
  const IndexPtr index = check_index(op, name, group);
  check_shape(op, name, group, shape, meaning);
  return index;
}

}  // namespace

std::vector<int64_t> rows_of(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  return shape;
}

PairInputs check_pair(const char* op, const Tensor& x, const Tensor& y, const Tensor* cu_x, const Tensor* cu_y,
                      const PairOptions& options) {
  const bool packed = cu_x != nullptr, shared = !packed && y.dim() == 2;
  TOKRED_CHECK(x.dim() == (packed ? 2 : 3), op, ": expected x of shape ",
               packed ? "[total_x, dim] (with cu_seqlens_x)" : "[batch_size, num_x, dim]", ", got ", shape_of(x));
  TOKRED_CHECK(y.dim() == 2 || (!packed && y.dim() == 3), op, ": expected y of shape ",
               packed ? "[total_y, dim] (with cu_seqlens_y)" : "[batch_size, num_y, dim] or [num_y, dim]", ", got ",
               shape_of(y));
  PairInputs in{};
  in.dtype = check_float(op, "x", x);
  check_dtype(op, "y", y, x.scalar_type());
  check_same_device(op, "x", x, "y", y);
  check_last_dim(op, "x", x);
  check_last_dim(op, "y", y);
  in.dim = x.size(x.dim() - 1);
  TOKRED_CHECK(y.size(y.dim() - 1) == in.dim && (packed || shared || y.size(0) == x.size(0)), op,
               ": expected y with the ", packed || shared ? "dim" : "batch_size and dim", " of x ", shape_of(x),
               ", got ", shape_of(y));
  in.num_x = x.size(packed ? 0 : 1);
  in.num_y = y.size(y.dim() - 2);
  check_int32_range(op, "num_x", in.num_x);
  check_int32_range(op, "num_y", in.num_y);
  in.batch_size = packed ? cu_x->size(0) - 1 : x.size(0);
  if (packed) {
    check_cu_seqlens(op, *cu_x, "x", x, "cu_seqlens_x");
    check_cu_seqlens(op, *cu_y, "x", x, "cu_seqlens_y");
    check_shape(op, "cu_seqlens_y", *cu_y, {in.batch_size + 1}, "[batch_size + 1]");
    in.cu_x = static_cast<const int32_t*>(cu_x->const_data_ptr());
    in.cu_y = static_cast<const int32_t*>(cu_y->const_data_ptr());
  }
  // A batch of one has any stride.
  in.stride_x_batch = !packed && in.batch_size > 1 ? x.stride(0) : 0;
  in.stride_y_batch = !packed && !shared && in.batch_size > 1 ? y.stride(0) : 0;
  in.stride_x = x.stride(x.dim() - 2);
  in.stride_y = y.stride(y.dim() - 2);
  in.stride_y_list = packed || shared ? 0 : in.num_y;

  const std::vector<int64_t> y_rows = rows_of(y);
  const char* y_meaning = packed ? "[total_y]" : shared ? "[num_y]" : "[batch_size, num_y]";
  if (options.drop_mask) {
    check_dtype(op, "drop_mask", *options.drop_mask, ScalarType::Bool);
    check_same_device(op, "x", x, "drop_mask", *options.drop_mask);
    check_shape(op, "drop_mask", *options.drop_mask, y_rows, y_meaning);
    check_contiguous(op, "drop_mask", *options.drop_mask);
    in.drop_mask = data_or_null<uint8_t>(options.drop_mask);
  }
  TOKRED_CHECK(options.x_group.has_value() == options.y_group.has_value(), op,
               ": expected x_group and y_group, both or none, got ", options.x_group ? "x_group" : "y_group", " alone");
  if (options.x_group) {
    in.x_group =
        check_group(op, "x_group", *options.x_group, x, rows_of(x), packed ? "[total_x]" : "[batch_size, num_x]");
    in.y_group = check_group(op, "y_group", *options.y_group, x, y_rows, y_meaning);
  }
  TOKRED_CHECK(options.group_rule == "same" || options.group_rule == "other", op,
               ": expected group_rule \"same\" or \"other\", got \"", options.group_rule, "\"");
  in.same_group = options.group_rule == "same";
  in.exclude_self = options.exclude_self;
  in.metric = parse_metric(op, options.metric);
  in.x = x.const_data_ptr();
  in.y = y.const_data_ptr();
  return in;
}

}  // namespace tokred
