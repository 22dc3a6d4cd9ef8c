// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/run_markers.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

Results call(int64_t batch_size, int64_t num_tokens, int percent, const std::vector<int32_t>& bounds,
             const Side& side) {
  Random random(static_cast<uint64_t>(num_tokens));
  const bool packed = !bounds.empty();
  const int64_t total = packed ? num_tokens : batch_size * num_tokens;
  std::vector<uint8_t> bits = random.whole<uint8_t>(total, 0, 100);
  for (uint8_t& bit : bits) bit = bit < percent;
  const Buffer<uint8_t> keep(side, bits), kept_or_marker(side, total), marker(side, total);
  const Buffer<int32_t> cu_seqlens(side, bounds), num_runs(side, batch_size);
  RunMarkersArgs args{};
  args.keep = keep.data();
  args.cu_seqlens = packed ? cu_seqlens.data() : nullptr;
  args.kept_or_marker = kept_or_marker.data();
  args.marker = marker.data();
  args.num_runs = num_runs.data();
  args.batch_size = batch_size;
  args.num_tokens = packed ? 0 : num_tokens;
  args.total_tokens = total;
  TOKRED_RUN(side, run_markers, args);
  return Results().add("kept_or_marker", kept_or_marker).add("marker", marker).add("num_runs", num_runs);
}

void check_all(int64_t batch_size, int64_t num_tokens, const std::vector<int32_t>& bounds = {}) {
  for (const int percent : {0, 5, 50, 100}) {
    check(text(batch_size, " x ", num_tokens, ", ", percent, "%"),
          [&](const Side& side) { return call(batch_size, num_tokens, percent, bounds, side); });
  }
}

}  // namespace

TOKRED_TEST(run_markers, dense) {  // the ends of a warp, of the block, of a vector of the CPU
  for (const int64_t n : {1, 2, 31, 32, 33, 64, 65, 512, 513, 6400}) check_all(3, n);
}
TOKRED_TEST(run_markers, packed) { check_all(4, 900, {0, 20, 20, 700, 900}); }
TOKRED_TEST(run_markers, empty) {
  check_all(0, 40);
  check_all(3, 0);
}
