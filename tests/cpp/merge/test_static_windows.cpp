// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/static_windows.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

Results call(int64_t batch_size, int64_t num_frames, int64_t num_positions, int64_t max_window, int percent,
             const std::vector<int32_t>& counts, const Side& side) {
  Random random(static_cast<uint64_t>(num_frames));
  std::vector<float> values = random.whole<float>(batch_size * (num_frames - 1) * num_positions, 0, 100);
  const Buffer<float> similarity(side, values);
  const Buffer<int32_t> frame_counts(side, counts);
  const Buffer<int64_t> window_idx(side, batch_size * num_frames), num_saved(side, batch_size);
  const Buffer<uint8_t> is_static(side, batch_size * num_frames * num_positions);
  StaticWindowsArgs args{};
  args.similarity = similarity.data();
  args.frame_counts = counts.empty() ? nullptr : frame_counts.data();
  args.window_idx = window_idx.data();
  args.is_static = is_static.data();
  args.num_saved = num_saved.data();
  args.batch_size = batch_size;
  args.num_frames = num_frames;
  args.num_positions = num_positions;
  args.max_window = max_window;
  args.threshold = static_cast<float>(percent);
  TOKRED_RUN(side, static_windows, args);
  return Results().add("window_idx", window_idx).add("is_static", is_static).add("num_saved", num_saved);
}

void check_all(int64_t batch_size, int64_t num_frames, int64_t num_positions, const std::vector<int32_t>& counts = {}) {
  for (const int percent : {-1, 5, 50, 100}) {
    for (const int64_t max_window : {1, 4, 64}) {
      check(text(batch_size, " x ", num_frames, " x ", num_positions, ", ", percent, "%, windows of ", max_window),
            [&](const Side& side) {
              return call(batch_size, num_frames, num_positions, max_window, percent, counts, side);
            });
    }
  }
}

}  // namespace

TOKRED_TEST(static_windows, dense) {  // the ends of a warp and of the block
  check_all(2, 1, 5);
  check_all(2, 33, 31);
  check_all(1, 9, 257);
}
TOKRED_TEST(static_windows, ragged) { check_all(4, 12, 40, {12, 0, 1, 7}); }
TOKRED_TEST(static_windows, empty) {
  check_all(0, 4, 5);
  check_all(2, 4, 0);
}
