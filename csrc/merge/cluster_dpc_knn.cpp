// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/cluster_dpc_knn.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "cluster_dpc_knn";

struct Outputs {
  Tensor centre_idx, dst_idx, num_centres, score, log_density;
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> all() const {
    return {centre_idx, dst_idx, num_centres, score, log_density};
  }
};

using Run = void (*)(ClusterDpcArgs& args, const Tensor& x);

void run_cpu(ClusterDpcArgs& args, const Tensor&) { cluster_dpc_knn_cpu(args); }
[[maybe_unused]] void run_cuda(ClusterDpcArgs& args, const Tensor& x) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
  const OnDevice device(x);
  const ClusterDpcPolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.x));
  const int64_t tokens = args.cu_seqlens ? args.num_tokens : args.batch_size * args.num_tokens;
  Tensor partial = new_empty(x, {2 * policy.splits, tokens, policy.kept}, ScalarType::Float);
  Tensor square = new_empty(x, {tokens}, ScalarType::Float);
  Tensor nearest = new_empty(x, {tokens}, ScalarType::Long);
  Tensor words = new_empty(x, {5, tokens}, ScalarType::Int);
  Tensor farthest = new_empty(x, {args.batch_size}, ScalarType::Int);
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  args.square = static_cast<float*>(square.mutable_data_ptr());
  args.nearest = static_cast<unsigned long long*>(nearest.mutable_data_ptr());
  args.order = static_cast<int32_t*>(words.mutable_data_ptr());
  args.slot = args.order + tokens;
  args.centre = args.slot + tokens;
  args.cluster = args.centre + tokens;
  args.denser = reinterpret_cast<uint32_t*>(args.cluster + tokens);
  args.farthest = static_cast<uint32_t*>(farthest.mutable_data_ptr());
  check_cuda(kOp, cluster_dpc_knn_cuda(args, device.stream()));
#endif
}

bool parse_by_score(const std::string& order) {
  TOKRED_CHECK(order == "index" || order == "score", kOp, ": expected order \"index\" or \"score\", got \"", order,
               "\"");
  return order == "score";
}

Outputs cluster(Run run, const Tensor& x, int64_t num_clusters, const OptTensor& cu_seqlens, int64_t max_seqlen,
                const OptTensor& drop_mask, int64_t k, double noise, int64_t seed, const std::string& order) {
  const bool packed = cu_seqlens.has_value();
  TOKRED_CHECK(x.dim() == (packed ? 2 : 3), kOp, ": expected x of shape ",
               packed ? "[total_tokens, dim] (with cu_seqlens)" : "[batch_size, num_tokens, dim]", ", got ",
               shape_of(x));
  ClusterDpcArgs args{};
  args.dtype = check_float(kOp, "x", x);
  check_last_dim(kOp, "x", x);
  const int64_t num_tokens = x.size(packed ? 0 : 1);
  check_int32_range(kOp, "num_tokens", num_tokens);
  if (packed) {
    check_cu_seqlens(kOp, *cu_seqlens, "x", x);
    TOKRED_CHECK(max_seqlen >= 0 && max_seqlen <= num_tokens, kOp, ": expected max_seqlen in [0, ", num_tokens,
                 "], got ", max_seqlen);
    TOKRED_CHECK(num_clusters >= 0, kOp, ": expected num_clusters >= 0, got ", num_clusters);
    check_int32_range(kOp, "num_clusters", num_clusters);
  } else {
    TOKRED_CHECK(num_clusters >= 0 && num_clusters <= num_tokens, kOp, ": expected num_clusters in [0, ", num_tokens,
                 "], got ", num_clusters);
  }
  TOKRED_CHECK(k >= 1 && k <= kDpcMaxNeighbours, kOp, ": expected k in [1, ", kDpcMaxNeighbours, "], got ", k);
  TOKRED_CHECK(noise >= 0, kOp, ": expected noise >= 0, got ", noise);
  const int64_t batch_size = packed ? cu_seqlens->size(0) - 1 : x.size(0);
  const std::vector<int64_t> shape = packed ? std::vector<int64_t>{num_tokens} : std::vector{batch_size, num_tokens};
  if (drop_mask) {
    check_dtype(kOp, "drop_mask", *drop_mask, ScalarType::Bool);
    check_same_device(kOp, "x", x, "drop_mask", *drop_mask);
    check_shape(kOp, "drop_mask", *drop_mask, shape, packed ? "[total_tokens]" : "[batch_size, num_tokens]");
    check_contiguous(kOp, "drop_mask", *drop_mask);
  }
  args.by_score = parse_by_score(order);

  Outputs out{new_empty(x, {batch_size, num_clusters}, ScalarType::Long), new_empty(x, shape, ScalarType::Long),
              new_empty(x, {batch_size}, ScalarType::Int), new_empty(x, shape, ScalarType::Float),
              new_empty(x, shape, ScalarType::Float)};
  args.x = x.const_data_ptr();
  args.drop_mask = data_or_null<uint8_t>(drop_mask);
  args.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  args.centre_idx = static_cast<int64_t*>(out.centre_idx.mutable_data_ptr());
  args.dst_idx = static_cast<int64_t*>(out.dst_idx.mutable_data_ptr());
  args.num_centres = static_cast<int32_t*>(out.num_centres.mutable_data_ptr());
  args.score = static_cast<float*>(out.score.mutable_data_ptr());
  args.log_density = static_cast<float*>(out.log_density.mutable_data_ptr());
  args.batch_size = batch_size;
  args.num_tokens = num_tokens;
  args.max_seqlen = packed ? max_seqlen : num_tokens;
  args.dim = x.size(packed ? 1 : 2);
  args.num_clusters = num_clusters;
  args.k = k;
  args.stride_batch = packed ? 0 : x.stride(0);
  args.stride_token = x.stride(packed ? 0 : 1);
  args.seed = static_cast<uint64_t>(seed);
  args.noise = static_cast<float>(noise);
  run(args, x);
  return out;
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plain(const Tensor& x, int64_t num_clusters,
                                                         const OptTensor& drop_mask, int64_t k, double noise,
                                                         int64_t seed, const std::string& order) {
  return cluster(run, x, num_clusters, std::nullopt, 0, drop_mask, k, noise, seed, order).all();
}

template <Run run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed(const Tensor& x, int64_t num_clusters,
                                                          const Tensor& cu_seqlens, int64_t max_seqlen,
                                                          const OptTensor& drop_mask, int64_t k, double noise,
                                                          int64_t seed, const std::string& order) {
  return cluster(run, x, num_clusters, cu_seqlens, max_seqlen, drop_mask, k, noise, seed, order).all();
}

// Sizes: batch_size, num_tokens, dim, num_clusters, element_size; k is 5 unless given.
Plan plan_cluster_dpc_knn(const PlanSizes& sizes) {
  ClusterDpcArgs a{};
  a.batch_size = sizes["batch_size"];
  a.num_tokens = a.max_seqlen = sizes["num_tokens"];
  a.dim = a.stride_token = sizes["dim"];
  a.num_clusters = sizes["num_clusters"];
  a.k = sizes.get("k", 5);
  a.stride_batch = a.num_tokens * a.dim;
  a.dtype = sizes.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  const ClusterDpcPolicy policy = choose_policy(a, 0);
  const int64_t row_blocks = a.batch_size * policy.row_blocks;
  const auto by_tokens = [&](int64_t per_block) { return a.batch_size * ceil_div(a.max_seqlen, per_block); };
  const int64_t ranking = by_tokens(kDpcRankThreads / kDpcRankLanes);
  Plan plan;
  plan.launches = {{"dpc_prepare_kernel", {a.batch_size * dpc_prepare_blocks(a)}, 128},
                   {"dpc_nearest_kernel", {row_blocks * policy.splits}, 128},
                   {"dpc_density_kernel", {by_tokens(kDpcTokenThreads)}, kDpcTokenThreads},
                   {"dpc_rank_kernel", {ranking}, kDpcRankThreads},
                   {"dpc_denser_kernel", {row_blocks * policy.splits}, 128},
                   {"dpc_score_kernel", {ranking}, kDpcRankThreads},
                   {"dpc_centres_kernel", {a.batch_size}, kDpcCentreThreads},
                   {"dpc_assign_kernel", {row_blocks * policy.centre_splits}, 128},
                   {"dpc_finish_kernel", {by_tokens(kDpcTokenThreads)}, kDpcTokenThreads}};
  return plan;
}
TOKRED_PLAN(cluster_dpc_knn, plan_cluster_dpc_knn)

#define TOKRED_DPC_OPTIONS                                                                              \
  "Tensor? drop_mask=None, SymInt k=5, float noise=0.0, SymInt seed=0, str order=\"index\") -> (Tensor" \
  " centre_idx, Tensor dst_idx, Tensor num_centres, Tensor score, Tensor log_density)"

TOKRED_SCHEMA(m) {
  m.def("cluster_dpc_knn(Tensor x, SymInt num_clusters, " TOKRED_DPC_OPTIONS);
  m.def(
      "cluster_dpc_knn.packed(Tensor x, SymInt num_clusters, Tensor cu_seqlens, SymInt max_seqlen,"
      " " TOKRED_DPC_OPTIONS);
}
#undef TOKRED_DPC_OPTIONS
TOKRED_IMPL_CPU(m) {
  m.impl("cluster_dpc_knn", TORCH_BOX(&plain<run_cpu>));
  m.impl("cluster_dpc_knn.packed", TORCH_BOX(&packed<run_cpu>));
}
TOKRED_IMPL_CUDA(m) {
  m.impl("cluster_dpc_knn", TORCH_BOX(&plain<run_cuda>));
  m.impl("cluster_dpc_knn.packed", TORCH_BOX(&packed<run_cuda>));
}

}  // namespace
}  // namespace tokred
