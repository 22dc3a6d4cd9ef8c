// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/row_similarity.h"

#include <string>

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "row_similarity";

struct Call {
  RowSimilarityArgs args;
  std::vector<Tensor> out;
};

// x of 2 to 4 dimensions as rows of three sizes, the missing ones 1.
RowsAt rows_at(const Tensor& x) {
  RowsAt rows{x.const_data_ptr(), {0, 0, 0}};
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows.stride[4 - x.dim() + d] = x.stride(d);
  return rows;
}

// Takes dimensions that go on where the next one ends as part of it.
void merge_dims(RowSimilarityArgs& a) {
  for (int round = 0; round < 2; ++round) {
    const auto goes_on = [&](const RowsAt& rows) { return rows.stride[1] == a.size[2] * rows.stride[2]; };
    if (a.size[1] != 1 && !(goes_on(a.x) && goes_on(a.y))) return;
    a.size[2] *= a.size[1];
    a.size[1] = a.size[0];
    a.size[0] = 1;
    for (RowsAt* rows : {&a.x, &a.y}) {
      rows->stride[1] = rows->stride[0];
      rows->stride[0] = 0;
    }
  }
}

float** wanted(RowSimilarityArgs& a, const std::string& measure) {
  if (measure == "cosine") return &a.cosine;
  if (measure == "dot") return &a.dot;
  if (measure == "l2") return &a.l2;
  if (measure == "norm_ratio") return &a.norm_ratio;
  return nullptr;
}

Call prepare(const Tensor& x, const Tensor& y, const std::string& measures) {
  RowSimilarityArgs a{};
  TOKRED_CHECK(x.dim() >= 2 && x.dim() <= 4,
               "row_similarity: expected x of shape [..., num_tokens, dim] with 2 to 4 dimensions, got ", shape_of(x));
  a.dtype = check_float(kOp, "x", x);
  check_same_device(kOp, "x", x, "y", y);
  TOKRED_CHECK(y.scalar_type() == x.scalar_type(), "row_similarity: expected y of the dtype of x (", dtype_of(x),
               "), got ", dtype_of(y));
  check_shape(kOp, "y", y, {x.sizes().begin(), x.sizes().end()}, "[..., num_tokens, dim]");
  check_last_dim(kOp, "x", x);
  check_last_dim(kOp, "y", y);
  a.x = rows_at(x);
  a.y = rows_at(y);
  a.dim = x.size(x.dim() - 1);
  const std::vector<int64_t> rows(x.sizes().begin(), x.sizes().end() - 1);
  for (int64_t& size : a.size) size = 1;
  for (size_t d = 0; d < rows.size(); ++d) a.size[3 - rows.size() + d] = rows[d];
  merge_dims(a);
  std::vector<Tensor> out;
  std::istringstream names(measures);
  for (std::string name; std::getline(names, name, ',');) {
    float** const data = wanted(a, name);
    TOKRED_CHECK(data, "row_similarity: expected measure to be cosine, dot, l2 or norm_ratio, got ", name);
    TOKRED_CHECK(!*data, "row_similarity: expected each measure once, got ", measures);
    out.push_back(new_empty(x, rows, ScalarType::Float));
    *data = static_cast<float*>(out.back().mutable_data_ptr());
  }
  TOKRED_CHECK(!out.empty(), "row_similarity: expected a measure, got none");
  return {a, out};
}

using Run = void (*)(const RowSimilarityArgs& args, const Tensor& x);

void run_cpu(const RowSimilarityArgs& args, const Tensor&) { row_similarity_cpu(args); }

[[maybe_unused]] void run_cuda(const RowSimilarityArgs& args, const Tensor& x) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(x);
  check_cuda(kOp, row_similarity_cuda(args, device.stream()));
#endif
}

template <Run run>
std::vector<Tensor> row_similarity(const Tensor& x, const Tensor& y, std::string measures) {
  Call call = prepare(x, y, measures);
  if (call.args.num_rows() > 0) run(call.args, x);
  return call.out;
}

// Sizes: num_rows, dim, element_size.
Plan plan_row_similarity(const PlanSizes& s) {
  const int64_t rows = kRowSimilarityThreads >> row_similarity_lanes_log2(s["dim"], s.get("element_size", 2));
  Plan plan;
  plan.launches.push_back({"row_similarity_kernel", {ceil_div(s["num_rows"], rows), 1, 1}, kRowSimilarityThreads});
  return plan;
}
TOKRED_PLAN(row_similarity, plan_row_similarity)

TOKRED_SCHEMA(m) { m.def("row_similarity(Tensor x, Tensor y, str measures) -> Tensor[]"); }
TOKRED_IMPL_CPU(m) { m.impl("row_similarity", TORCH_BOX(&row_similarity<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("row_similarity", TORCH_BOX(&row_similarity<run_cuda>)); }

}  // namespace
}  // namespace tokred
