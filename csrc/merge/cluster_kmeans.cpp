// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/cluster_kmeans.h"

#include "torch/glue.h"

namespace tokred {
namespace {

constexpr const char* kOp = "cluster_kmeans";

KmeansInit parse_init(const std::string& init) {
  if (init == "kkz") return KmeansInit::kKkz;
  TOKRED_CHECK(init == "kmeans++", kOp, ": expected init \"kkz\", \"kmeans++\" or a tensor, got \"", init, "\"");
  return KmeansInit::kPlusPlus;
}
bool parse_cosine(const std::string& metric) {
  TOKRED_CHECK(metric == "l2" || metric == "cosine", kOp, ": expected metric \"l2\" or \"cosine\", got \"", metric,
               "\"");
  return metric == "cosine";
}
bool parse_medoid(const std::string& update) {
  TOKRED_CHECK(update == "mean" || update == "medoid", kOp, ": expected update \"mean\" or \"medoid\", got \"", update,
               "\"");
  return update == "medoid";
}

template <bool kCuda>
std::tuple<Tensor, Tensor, Tensor, Tensor> cluster(const Tensor& x, int64_t num_clusters, const OptTensor& starts,
                                                   const OptTensor& drop_mask, const std::string& init,
                                                   const std::string& metric, const std::string& update,
                                                   int64_t max_iter, double tol, int64_t seed) {
  TOKRED_CHECK(x.dim() == 3, kOp, ": expected x of shape [batch_size, num_tokens, dim], got ", shape_of(x));
  ClusterKmeansArgs args{};
  args.dtype = check_float(kOp, "x", x);
  check_last_dim(kOp, "x", x);
  const int64_t batch_size = x.size(0), num_tokens = x.size(1), dim = x.size(2);
  check_int32_range(kOp, "num_tokens", num_tokens);
  TOKRED_CHECK(num_clusters >= 1, kOp, ": expected num_clusters >= 1, got ", num_clusters);
  check_int32_range(kOp, "num_clusters", num_clusters);
  TOKRED_CHECK(max_iter >= 0, kOp, ": expected max_iter >= 0, got ", max_iter);
  TOKRED_CHECK(tol >= 0, kOp, ": expected tol >= 0, got ", tol);
  args.init = starts ? KmeansInit::kGiven : parse_init(init);
  args.cosine = parse_cosine(metric);
  args.medoid = parse_medoid(update);
  if (starts) {
    TOKRED_CHECK(starts->scalar_type() == x.scalar_type(), kOp, ": expected init of the dtype of x, ", dtype_of(x),
                 ", got ", dtype_of(*starts));
    check_same_device(kOp, "x", x, "init", *starts);
    check_shape(kOp, "init", *starts, {batch_size, num_clusters, dim}, "[batch_size, num_clusters, dim]");
    check_contiguous(kOp, "init", *starts);
    args.starts = starts->const_data_ptr();
  }
  if (drop_mask) {
    check_dtype(kOp, "drop_mask", *drop_mask, ScalarType::Bool);
    check_same_device(kOp, "x", x, "drop_mask", *drop_mask);
    check_shape(kOp, "drop_mask", *drop_mask, {batch_size, num_tokens}, "[batch_size, num_tokens]");
    check_contiguous(kOp, "drop_mask", *drop_mask);
    args.drop_mask = data_or_null<uint8_t>(drop_mask);
  }

  Tensor centroids = new_empty(x, {batch_size, num_clusters, dim}, x.scalar_type());
  Tensor dst_idx = new_empty(x, {batch_size, num_tokens}, ScalarType::Long);
  Tensor num_members = new_empty(x, {batch_size, num_clusters}, ScalarType::Int);
  Tensor num_iter = new_empty(x, {batch_size}, ScalarType::Int);
  Tensor term = new_empty(x, {2, batch_size, num_tokens}, ScalarType::Float);
  Tensor of_cluster = new_empty(x, {3, batch_size, num_clusters}, ScalarType::Float);
  Tensor mean = new_empty(x, {batch_size, num_clusters, dim}, x.scalar_type());
  Tensor offsets = new_empty(x, {batch_size, num_clusters + 1}, ScalarType::Int);
  Tensor order = new_empty(x, {batch_size, num_tokens}, ScalarType::Int);
  Tensor done = new_empty(x, {batch_size}, ScalarType::Int);
  Tensor pick = new_empty(x, {batch_size, num_clusters}, ScalarType::Long);
  Tensor nearest = new_empty(x, {kCuda ? batch_size : 0, num_tokens}, ScalarType::Long);
  args.x = x.const_data_ptr();
  args.centroids = centroids.mutable_data_ptr();
  args.dst_idx = static_cast<int64_t*>(dst_idx.mutable_data_ptr());
  args.num_members = static_cast<int32_t*>(num_members.mutable_data_ptr());
  args.num_iter = static_cast<int32_t*>(num_iter.mutable_data_ptr());
  args.batch_size = batch_size;
  args.num_tokens = num_tokens;
  args.dim = dim;
  args.num_clusters = num_clusters;
  args.max_iter = max_iter;
  args.stride_batch = x.stride(0);
  args.stride_token = x.stride(1);
  args.seed = static_cast<uint64_t>(seed);
  args.tol = static_cast<float>(tol);
  args.term = static_cast<float*>(term.mutable_data_ptr());
  args.distance = args.term + batch_size * num_tokens;
  args.centroid_term = static_cast<float*>(of_cluster.mutable_data_ptr());
  args.mean_size = args.centroid_term + batch_size * num_clusters;
  args.moved = args.mean_size + batch_size * num_clusters;
  args.mean = mean.mutable_data_ptr();
  args.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  args.order = static_cast<int32_t*>(order.mutable_data_ptr());
  args.done = static_cast<int32_t*>(done.mutable_data_ptr());
  args.pick = static_cast<unsigned long long*>(pick.mutable_data_ptr());
  args.nearest = static_cast<unsigned long long*>(nearest.mutable_data_ptr());
  if constexpr (kCuda) {
#if defined(TOKRED_WITH_CUDA) || defined(TOKRED_SIMT)
    const OnDevice device(x);
    check_cuda(kOp, cluster_kmeans_cuda(args, device.stream()));
#endif
  } else {
    cluster_kmeans_cpu(args);
  }
  return {centroids, dst_idx, num_members, num_iter};
}

// Sizes: batch_size, num_tokens, dim, num_clusters, max_iter, element_size; given_starts and medoid are 0 unless given.
// The two launches of segment_merge in each iteration are not among them.
Plan plan_cluster_kmeans(const PlanSizes& sizes) {
  ClusterKmeansArgs a{};
  a.batch_size = sizes["batch_size"];
  a.num_tokens = sizes["num_tokens"];
  a.dim = a.stride_token = sizes["dim"];
  a.num_clusters = sizes["num_clusters"];
  a.stride_batch = a.num_tokens * a.dim;
  a.dtype = sizes.get("element_size", 2) == 4 ? DType::kF32 : DType::kBF16;
  const ClusterKmeansPolicy policy = choose_policy(a, 0, 0);
  const int64_t max_iter = sizes["max_iter"], clusters = a.batch_size * a.num_clusters;
  const auto by_tokens = [&](int64_t per_block) { return a.batch_size * ceil_div(a.num_tokens, per_block); };
  Plan plan;
  plan.launches = {{"kmeans_clear_kernel", {a.batch_size}, kKmeansThreads},
                   {"kmeans_prepare_kernel", {by_tokens(kKmeansPrepareRows)}, 128}};
  for (int64_t step = 0; step < a.num_clusters && !sizes.get("given_starts", 0); ++step) {
    plan.launches.push_back({"kmeans_start_kernel", {by_tokens(kKmeansTokensPerBlock)}, kKmeansThreads});
  }
  plan.launches.push_back({"kmeans_gather_kernel", {clusters}, kKmeansThreads});
  for (int64_t i = 0; i <= max_iter; ++i) {
    const int64_t terms = a.batch_size * ceil_div<int64_t>(a.num_clusters, kKmeansPrepareRows);
    plan.launches.push_back({"kmeans_terms_kernel", {terms}, 128});
    plan.launches.push_back({"kmeans_assign_kernel", {a.batch_size * policy.row_blocks * policy.splits}, 128});
    plan.launches.push_back({"kmeans_label_kernel", {by_tokens(kKmeansThreads)}, kKmeansThreads});
    if (i == max_iter) break;
    if (sizes.get("medoid", 0)) {
      plan.launches.push_back({"kmeans_medoid_kernel", {by_tokens(kKmeansTokensPerBlock)}, kKmeansThreads});
    }
    plan.launches.push_back({"kmeans_move_kernel", {clusters}, kKmeansThreads});
    plan.launches.push_back({"kmeans_converge_kernel", {a.batch_size}, kKmeansThreads});
  }
  return plan;
}
TOKRED_PLAN(cluster_kmeans, plan_cluster_kmeans)

TOKRED_SCHEMA(m) {
  m.def(
      "cluster_kmeans(Tensor x, SymInt num_clusters, Tensor? starts=None, Tensor? drop_mask=None, str init=\"kkz\","
      " str metric=\"l2\", str update=\"mean\", SymInt max_iter=20, float tol=0.0, SymInt seed=0) -> (Tensor centroids,"
      " Tensor dst_idx, Tensor num_members, Tensor num_iter)");
}
TOKRED_IMPL_CPU(m) { m.impl("cluster_kmeans", TORCH_BOX(&cluster<false>)); }
TOKRED_IMPL_CUDA(m) { m.impl("cluster_kmeans", TORCH_BOX(&cluster<true>)); }

}  // namespace
}  // namespace tokred
