// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/segment_merge.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_tokens, num_out, dim;
  MergeMode mode = MergeMode::kMean;
  bool weighted = false, sized = false;
  int64_t lead = 0;         // elements before x
  int64_t num_sources = 0;  // rows of x, where entries name them
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens + c.dim));
  const int64_t tokens = c.batch_size * c.num_tokens;
  const int64_t num_sources = c.num_sources ? c.num_sources : c.num_tokens;
  std::vector<T> rows = random.normals<T>(c.batch_size * num_sources * c.dim);
  for (size_t i = 0; i < rows.size(); i += 101) rows[i] = static_cast<T>(-0.f);
  const Buffer<T> x(side, rows, c.lead), merged(side, c.batch_size * c.num_out * c.dim);
  // More than half of the ids in the first tenth: segments from none to many members; -1 and num_out are dropped.
  std::vector<int64_t> ids = random.whole<int64_t>(tokens, -1, c.num_out + 1);
  for (int64_t& id : ids) id = random.below(2) ? id : id / 10;
  const Buffer<int64_t> dst_idx(side, ids);
  const Buffer<int32_t> src_idx(side, random.whole<int32_t>(tokens, -1, num_sources + 1));
  const Buffer<T> again(side, c.batch_size * c.num_out * c.dim);
  std::vector<float> weights = random.normals<float>(tokens), sizes = random.whole<float>(tokens, 1, 5);
  for (float& w : weights) w = std::fabs(w) + 0.1f;
  const Buffer<float> weight(side, weights), size(side, sizes), size_out(side, c.batch_size * c.num_out);
  const Buffer<int32_t> offsets(side, c.batch_size * (c.num_out + 1)), order(side, tokens);

  SegmentMergeArgs args{};
  args.x = x.data();
  args.dst_idx = {dst_idx.data(), true};
  args.src_idx = {c.num_sources ? src_idx.data() : nullptr, false};
  args.num_sources = num_sources;
  args.weight = c.weighted ? weight.data() : nullptr;
  args.size = c.sized ? size.data() : nullptr;
  args.merged = merged.data();
  args.size_out = size_out.data();
  args.offsets = offsets.data();
  args.order = order.data();
  args.batch_size = c.batch_size;
  args.num_tokens = c.num_tokens;
  args.num_out = c.num_out;
  args.dim = c.dim;
  args.stride_batch = num_sources * c.dim;
  args.stride_token = c.dim;
  args.dtype = dtype;
  args.mode = c.mode;
  TOKRED_RUN(side, segment_merge, args);
  args.merged = again.data();  // another tensor with the same map
  args.sorted = true;
  TOKRED_RUN(side, segment_merge, args);
  const double rtol = c.mode == MergeMode::kMax ? 0 : rounding(dtype);
  return Results().add("merged", merged, rtol, rtol).add("size_out", size_out).add("again", again, rtol, rtol);
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_tokens, ", ", c.dim, "] to ", c.num_out, ", mode ",
                 static_cast<int>(c.mode)),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(segment_merge, modes) {
  for (const MergeMode mode : {MergeMode::kMean, MergeMode::kSum, MergeMode::kMax}) {
    for (const bool sized : {false, true}) {
      check_all({2, 77, 30, 40, mode, false, sized});
      if (mode != MergeMode::kMax) check_all({2, 77, 30, 40, mode, true, sized});
    }
  }
}
TOKRED_TEST(segment_merge, dims) {  // wide and narrow loads, 1 to 256 lanes per row, several chunks of a row
  for (const int64_t dim : {1, 3, 8, 33, 72, 80, 320, 768, 2056}) {
    check_all({2, 40, 15, dim});
    check_all({2, 40, 15, dim, MergeMode::kMax, false, false, 1});
  }
}
TOKRED_TEST(segment_merge, sorts) {  // 1 to 16 warps, several ranges of segments
  for (const int64_t num_tokens : {1, 63, 65, 700, 1500}) check_all({2, num_tokens, 50, 8});
  check_all({2, 1100, 2500, 4});
  check_all({1, 30, 5000, 4});
}
TOKRED_TEST(segment_merge, entries) {
  for (const MergeMode mode : {MergeMode::kMean, MergeMode::kSum, MergeMode::kMax}) {
    check_all({2, 90, 20, 40, mode, mode != MergeMode::kMax, true, 0, 33});
  }
  check_all({1, 1100, 2500, 4, MergeMode::kSum, true, false, 0, 7});
}
TOKRED_TEST(segment_merge, empty) {
  check_all({2, 0, 5, 8});
  check_all({2, 9, 0, 8});
  check_all({2, 9, 5, 0});
  check_all({0, 9, 5, 8});
}
