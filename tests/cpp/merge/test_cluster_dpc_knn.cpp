// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/cluster_dpc_knn.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_tokens, dim, num_clusters;
  int64_t k = 5;
  int drop_percent = 0;
  bool by_score = false;
  int64_t max_seqlen = 0;  // > 0: packed, num_tokens in all, in batch_size sequences
  int64_t lead = 0;        // elements before x
  float noise = 0.f;
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens + c.dim));
  const int64_t tokens = (c.max_seqlen ? 1 : c.batch_size) * c.num_tokens;
  // Small whole numbers: distances are exact, and many tie.
  const Buffer<T> x(side, random.whole<T>(tokens * c.dim, -2, 3), c.lead);
  std::vector<uint8_t> bits = random.whole<uint8_t>(tokens, 0, 100);
  for (uint8_t& bit : bits) bit = bit < c.drop_percent;
  std::vector<int32_t> ends(static_cast<size_t>(c.batch_size + 1));
  for (size_t b = 0; b < ends.size(); ++b) {
    ends[b] = static_cast<int32_t>(c.num_tokens * static_cast<int64_t>(b * b) / std::max<int64_t>(c.batch_size, 1) /
                                   std::max<int64_t>(c.batch_size, 1));
  }
  const Buffer<uint8_t> drop_mask(side, bits);
  const Buffer<int32_t> cu_seqlens(side, ends);
  const Buffer<int64_t> centre_idx(side, c.batch_size * c.num_clusters), dst_idx(side, tokens);
  const Buffer<int32_t> num_centres(side, c.batch_size);
  const Buffer<float> score(side, tokens), log_density(side, tokens);
  ClusterDpcArgs args{};
  args.x = x.data();
  args.drop_mask = c.drop_percent ? drop_mask.data() : nullptr;
  args.cu_seqlens = c.max_seqlen ? cu_seqlens.data() : nullptr;
  args.centre_idx = centre_idx.data();
  args.dst_idx = dst_idx.data();
  args.num_centres = num_centres.data();
  args.score = score.data();
  args.log_density = log_density.data();
  args.batch_size = c.batch_size;
  args.num_tokens = c.num_tokens;
  args.max_seqlen = c.max_seqlen ? c.max_seqlen : c.num_tokens;
  args.dim = c.dim;
  args.num_clusters = c.num_clusters;
  args.k = c.k;
  args.stride_batch = c.max_seqlen ? 0 : c.num_tokens * c.dim;
  args.stride_token = c.dim;
  args.seed = 7;
  args.noise = c.noise;
  args.by_score = c.by_score;
  args.dtype = dtype;
  const ClusterDpcPolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.x));
  const Buffer<float> partial(side, 2 * policy.splits * tokens * policy.kept), square(side, tokens);
  const Buffer<unsigned long long> nearest(side, tokens);
  const Buffer<int32_t> order(side, tokens), slot(side, tokens), centre(side, tokens), cluster(side, tokens);
  const Buffer<uint32_t> denser(side, tokens), farthest(side, c.batch_size);
  args.partial = partial.data();
  args.square = square.data();
  args.nearest = nearest.data();
  args.order = order.data();
  args.slot = slot.data();
  args.centre = centre.data();
  args.cluster = cluster.data();
  args.denser = denser.data();
  args.farthest = farthest.data();
  TOKRED_RUN(side, cluster_dpc_knn, args);
  return Results()
      .add("centre_idx", centre_idx)
      .add("dst_idx", dst_idx)
      .add("num_centres", num_centres)
      .add("score", score, 1e-5, 1e-5)
      .add("log_density", log_density, 1e-5, 1e-5);
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

TOKRED_TEST(cluster_dpc_knn, orders) {
  check_all({2, 61, 3, 11});
  check_all({2, 62, 3, 31, 9, 30, true});
  check_all({2, 61, 3, 61, 16, 100, true});  // nothing is left
}
TOKRED_TEST(cluster_dpc_knn, dims) {  // wide and narrow loads, one step of the depth and several
  for (const int64_t dim : {1, 7, 64, 136}) check_all({1, 70, dim, 20, 3});
  check_all({1, 70, 64, 20, 3, 0, false, 0, 1});
}
TOKRED_TEST(cluster_dpc_knn, splits) { check_all({1, 401, 8, 150, 5, 10, true}); }
TOKRED_TEST(cluster_dpc_knn, long_rows) {  // more than a block ranks or numbers at once
#ifdef TOKRED_TEST_DEVICE
  check("1100 tokens", [](const Side& side) { return call<c10::Half>({1, 1100, 4, 300}, DType::kF16, side); });
#endif
}
TOKRED_TEST(cluster_dpc_knn, packed) {
  check_all({4, 130, 4, 9, 5, 10, true, 60});
  check_all({4, 130, 4, 9, 5, 0, false, 20});
  check_all({2, 30, 4, 9, 5, 0, false, 1});
}
TOKRED_TEST(cluster_dpc_knn, noise) { check_all({2, 40, 3, 9, 5, 0, true, 0, 0, 0.5f}); }
TOKRED_TEST(cluster_dpc_knn, empty) {
  check_all({0, 20, 8, 3});
  check_all({2, 0, 8, 0});
  check_all({2, 1, 8, 1});
  check_all({2, 20, 0, 3});
  check_all({2, 20, 8, 0});
}
