// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per video. A sweep from the last frame to the first finds, for each frame and position, how far its run of
// static frames reaches; windows and masks are made from that.
#include "merge/static_windows.h"

#include <algorithm>

#include "common/parallel.h"

namespace tokred {
namespace {

constexpr int kHistograms = 4;

// reach[p] = the last frame that position p is static up to, from frame t on, given those from frame t + 1 on.
TOKRED_CLONES void step_back(const float* similarity, float threshold, int32_t t, const int32_t* next, int64_t n,
                             int32_t* reach) {
  for (int64_t p = 0; p < n; ++p) reach[p] = similarity[p] > threshold ? next[p] : t;
}
TOKRED_CLONES void mark_reaching(const int32_t* reach, int32_t last, int64_t n, uint8_t* mask) {
  for (int64_t p = 0; p < n; ++p) mask[p] = reach[p] >= last;
}

void divide(const StaticWindowsArgs& a, int64_t b, int32_t* reach, int32_t* count, int32_t* best, int32_t* first) {
  const int64_t n = a.num_positions;
  const int frames = frames_of(a, b);
  const float* similarity = a.similarity + b * (a.num_frames - 1) * n;
  for (int t = frames - 1; t >= 0; --t) {
    if (t == frames - 1) {
      std::fill_n(reach + t * n, n, t);
    } else {
      step_back(similarity + t * n, a.threshold, t, reach + (t + 1) * n, n, reach + t * n);
    }
    best[t] = -1;
  }
  for (int begin = 0; begin < frames; ++begin) {
    // count[t] = how many positions are static from begin to t: a histogram of where they end, summed from the end;
    // four of them take turns, since neighbours often end together and an increment waits for the one before it.
    std::fill(count + kHistograms * begin, count + kHistograms * frames, 0);
    for (int64_t p = 0; p < n; ++p) ++count[kHistograms * reach[begin * n + p] + p % kHistograms];
    int32_t reaching = 0;
    for (int t = frames - 1; t > begin; --t) {
      for (int h = 0; h < kHistograms; ++h) reaching += count[kHistograms * t + h];
      count[kHistograms * t] = reaching;
    }
    const int32_t before = begin == 0 ? 0 : best[begin - 1];
    const int64_t end = std::min<int64_t>(frames, begin + a.max_window);
    offer_window(before, begin, begin, best, first);
    for (int last = begin + 1; last < end; ++last) {
      offer_window(before + count[kHistograms * last] * (last - begin), begin, last, best, first);
    }
  }
  a.num_saved[b] = frames == 0 ? 0 : best[frames - 1];
  number_windows(frames, a.num_frames, first, a.window_idx + b * a.num_frames);
  uint8_t* is_static = a.is_static + b * a.num_frames * n;
  std::fill(is_static + frames * n, is_static + a.num_frames * n, uint8_t{0});
  for (int last = frames - 1; last >= 0;) {
    const int begin = first[last];
    uint8_t* mask = is_static + begin * n;
    mark_reaching(reach + begin * n, begin < last ? last : INT32_MAX, n, mask);
    for (int t = begin + 1; t <= last; ++t) std::copy_n(mask, n, is_static + t * n);
    last = begin - 1;
  }
}

}  // namespace

void static_windows_cpu(const StaticWindowsArgs& args) {
  const int64_t tokens = args.num_frames * args.num_positions;
  parallel_for(args.batch_size, 1 + 16384 / (tokens + 1), [&](int64_t begin, int64_t end) {
    const AlignedBuffer<int32_t> reach(tokens), per_frame((kHistograms + 2) * args.num_frames);
    for (int64_t b = begin; b < end; ++b) {
      int32_t* best = per_frame.data();
      divide(args, b, reach.data(), best + 2 * args.num_frames, best, best + args.num_frames);
    }
  });
}

}  // namespace tokred
