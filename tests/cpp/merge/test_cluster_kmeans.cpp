// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/cluster_kmeans.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_tokens, dim, num_clusters;
  KmeansInit init = KmeansInit::kKkz;
  bool cosine = false, medoid = false;
  int64_t max_iter = 1;
  int drop_percent = 0;
  int64_t lead = 0;  // elements before x
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens + c.dim));
  const int64_t tokens = c.batch_size * c.num_tokens, clusters = c.batch_size * c.num_clusters;
  // Small whole numbers: distances are exact; one iteration, since means differ by their last bit between devices.
  const Buffer<T> x(side, random.whole<T>(tokens * c.dim, -2, 3), c.lead);
  const Buffer<T> starts(side, random.whole<T>(clusters * c.dim, -2, 3));
  std::vector<uint8_t> bits = random.whole<uint8_t>(tokens, 0, 100);
  for (uint8_t& bit : bits) bit = bit < c.drop_percent;
  const Buffer<uint8_t> drop_mask(side, bits);
  const Buffer<T> centroids(side, clusters * c.dim), mean(side, clusters * c.dim);
  const Buffer<int64_t> dst_idx(side, tokens);
  const Buffer<int32_t> num_members(side, clusters), num_iter(side, c.batch_size), done(side, c.batch_size);
  const Buffer<float> term(side, tokens), distance(side, tokens), centroid_term(side, clusters);
  const Buffer<float> mean_size(side, clusters), moved(side, clusters);
  const Buffer<int32_t> offsets(side, clusters + c.batch_size), order(side, tokens);
  const Buffer<unsigned long long> pick(side, clusters), nearest(side, tokens);
  ClusterKmeansArgs args{};
  args.x = x.data();
  args.drop_mask = c.drop_percent ? drop_mask.data() : nullptr;
  args.starts = c.init == KmeansInit::kGiven ? starts.data() : nullptr;
  args.centroids = centroids.data();
  args.dst_idx = dst_idx.data();
  args.num_members = num_members.data();
  args.num_iter = num_iter.data();
  args.batch_size = c.batch_size;
  args.num_tokens = c.num_tokens;
  args.dim = c.dim;
  args.num_clusters = c.num_clusters;
  args.max_iter = c.max_iter;
  args.stride_batch = c.num_tokens * c.dim;
  args.stride_token = c.dim;
  args.seed = 7;
  args.init = c.init;
  args.cosine = c.cosine;
  args.medoid = c.medoid;
  args.dtype = dtype;
  args.term = term.data();
  args.centroid_term = centroid_term.data();
  args.distance = distance.data();
  args.mean = mean.data();
  args.mean_size = mean_size.data();
  args.offsets = offsets.data();
  args.order = order.data();
  args.done = done.data();
  args.pick = pick.data();
  args.nearest = nearest.data();
  args.moved = moved.data();
  TOKRED_RUN(side, cluster_kmeans, args);
  if (c.max_iter > 0) return Results().add("centroids", centroids, 1e-2, 1e-5).add("num_iter", num_iter);
  return Results().add("centroids", centroids).add("dst_idx", dst_idx).add("num_members", num_members);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_tokens, ", ", c.dim, "] clusters ", c.num_clusters),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(cluster_kmeans, starts) {
  check_all({2, 61, 3, 11, KmeansInit::kKkz, false, false, 0});
  check_all({2, 61, 3, 11, KmeansInit::kPlusPlus, false, false, 0, 30});
  check_all({2, 9, 3, 11, KmeansInit::kKkz, false, false, 0, 100});  // nothing is left
}
TOKRED_TEST(cluster_kmeans, dims) {  // wide and narrow loads, one step of the depth and several
  for (const int64_t dim : {1, 7, 64, 136}) check_all({1, 70, dim, 20, KmeansInit::kGiven});
  check_all({1, 70, 64, 20, KmeansInit::kGiven, false, false, 1, 0, 1});
}
TOKRED_TEST(cluster_kmeans, codes) { check_all({1, 140, 8, 300, KmeansInit::kGiven, false, false, 0, 10}); }
TOKRED_TEST(cluster_kmeans, iterations) {
  check_all({2, 130, 4, 6, KmeansInit::kGiven});
  check_all({2, 130, 4, 6, KmeansInit::kGiven, false, true});
  check_all({1, 70, 4, 4, KmeansInit::kGiven, true});
}
TOKRED_TEST(cluster_kmeans, empty) {
  check_all({0, 20, 8, 3});
  check_all({2, 0, 8, 1});
  check_all({2, 1, 8, 1});
  check_all({2, 20, 0, 3});
}
