// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/sinkhorn.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "sinkhorn";

using Run = void (*)(const SinkhornArgs& args, const Tensor& cost);

void run_cpu(const SinkhornArgs& args, const Tensor&) { sinkhorn_cpu(args); }
[[maybe_unused]] void run_cuda(const SinkhornArgs& args, const Tensor& cost) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(cost);
  SinkhornArgs with_workspace = args;
  Tensor workspace = new_empty(cost, {args.batch_size * 2 * (args.num_rows + args.num_cols)}, ScalarType::Float);
  with_workspace.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  check_cuda(kOp, sinkhorn_cuda(with_workspace, device.stream()));
#endif
}

const float* check_mass(const char* name, const OptTensor& mass, const Tensor& cost, int64_t count,
                        const char* meaning) {
  if (!mass) return nullptr;
  check_same_device(kOp, "cost", cost, name, *mass);
  check_dtype(kOp, name, *mass, ScalarType::Float);
  check_shape(kOp, name, *mass, {cost.size(0), count}, meaning);
  check_contiguous(kOp, name, *mass);
  return static_cast<const float*>(mass->const_data_ptr());
}

const int32_t* check_lens(const char* name, const OptTensor& lens, const Tensor& cost) {
  if (!lens) return nullptr;
  check_same_device(kOp, "cost", cost, name, *lens);
  check_dtype(kOp, name, *lens, ScalarType::Int);
  check_shape(kOp, name, *lens, {cost.size(0)}, "[batch_size]");
  check_contiguous(kOp, name, *lens);
  return static_cast<const int32_t*>(lens->const_data_ptr());
}

template <Run run>
std::tuple<Tensor, Tensor> sinkhorn(const Tensor& cost, const OptTensor& row_mass, const OptTensor& col_mass,
                                    const OptTensor& row_lens, const OptTensor& col_lens, double eps,
                                    int64_t max_rounds, double tol) {
  TOKRED_CHECK(cost.dim() == 3, "sinkhorn: expected cost of shape [batch_size, num_rows, num_cols], got ",
               shape_of(cost));
  SinkhornArgs args{};
  args.dtype = check_float(kOp, "cost", cost);
  check_last_dim(kOp, "cost", cost);
  const int64_t batch_size = cost.size(0), num_rows = cost.size(1), num_cols = cost.size(2);
  check_int32_range(kOp, "batch_size", batch_size);
  check_int32_range(kOp, "num_rows", num_rows);
  check_int32_range(kOp, "num_cols", num_cols);
  args.row_mass = check_mass("row_mass", row_mass, cost, num_rows, "[batch_size, num_rows]");
  args.col_mass = check_mass("col_mass", col_mass, cost, num_cols, "[batch_size, num_cols]");
  args.row_lens = check_lens("row_lens", row_lens, cost);
  args.col_lens = check_lens("col_lens", col_lens, cost);
  TOKRED_CHECK(eps >= 1e-30 && eps <= 1e30, "sinkhorn: expected eps in [1e-30, 1e+30], got ", eps);
  TOKRED_CHECK(tol >= 0, "sinkhorn: expected tol >= 0, got ", tol);
  TOKRED_CHECK(max_rounds >= 1, "sinkhorn: expected max_rounds >= 1, got ", max_rounds);
  check_int32_range(kOp, "max_rounds", max_rounds);
  Tensor plan = new_empty(cost, {batch_size, num_rows, num_cols}, ScalarType::Float);
  Tensor num_rounds = new_empty(cost, {batch_size}, ScalarType::Int);
  args.cost = cost.const_data_ptr();
  args.plan = static_cast<float*>(plan.mutable_data_ptr());
  args.num_rounds = static_cast<int32_t*>(num_rounds.mutable_data_ptr());
  args.batch_size = batch_size;
  args.num_rows = num_rows;
  args.num_cols = num_cols;
  args.stride_batch = cost.stride(0);
  args.stride_row = cost.stride(1);
  args.eps = static_cast<float>(eps);
  args.tol = static_cast<float>(tol);
  args.max_rounds = static_cast<int32_t>(max_rounds);
  run(args, cost);
  return {plan, num_rounds};
}

// Sizes: batch_size.
Plan plan_sinkhorn(const PlanSizes& sizes) {
  PlannedLaunch launch;
  launch.kernel = "sinkhorn_kernel";
  launch.grid[0] = sizes["batch_size"];
  launch.block = kSinkhornThreads;
  Plan plan;
  plan.launches = {launch};
  return plan;
}
TOKRED_PLAN(sinkhorn, plan_sinkhorn)

TOKRED_SCHEMA(m) {
  m.def(
      "sinkhorn(Tensor cost, Tensor? row_mass=None, Tensor? col_mass=None, Tensor? row_lens=None,"
      " Tensor? col_lens=None, float eps=0.1, SymInt max_rounds=100, float tol=1e-4)"
      " -> (Tensor plan, Tensor num_rounds)");
}
TOKRED_IMPL_CPU(m) { m.impl("sinkhorn", TORCH_BOX(&sinkhorn<run_cpu>)); }
TOKRED_IMPL_CUDA(m) { m.impl("sinkhorn", TORCH_BOX(&sinkhorn<run_cuda>)); }

}  // namespace
}  // namespace tokred
