// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"

namespace tokred {

constexpr int64_t kMaxWindowFrames = 2048;  // three integers each in a block's shared memory
constexpr int kStaticWindowsThreads = 256;

struct StaticWindowsArgs {
  const float* similarity;      // [batch_size, num_frames - 1, num_positions]
  const int32_t* frame_counts;  // [batch_size]; null: num_frames each
  int64_t* window_idx;          // [batch_size, num_frames]
  uint8_t* is_static;           // [batch_size, num_frames, num_positions]
  int64_t* num_saved;           // [batch_size]
  int64_t batch_size, num_frames, num_positions, max_window;
  float threshold;
};

TOKRED_HOST_DEVICE int frames_of(const StaticWindowsArgs& a, int64_t b) {
  const int64_t count = a.frame_counts ? int64_t{a.frame_counts[b]} : a.num_frames;
  return static_cast<int>(count < 0 ? 0 : count > a.num_frames ? a.num_frames : count);
}

// The best division of frames [0, last], as frames are added. A window [first, last] saves (last - first) tokens per
// position that is static in it; the division's saving is best[last], and its last window begins at first[last].
// Windows must come by ascending first, so that shorter ones win ties.
TOKRED_HOST_DEVICE void offer_window(int32_t saving, int first_frame, int last, int32_t* best, int32_t* first) {
  if (saving < best[last]) return;
  best[last] = saving;
  first[last] = first_frame;
}

// window_idx of all frames from first[]. An int32_t[num_frames]; first[] is overwritten.
TOKRED_HOST_DEVICE void number_windows(int num_frames, int64_t max_frames, int32_t* first, int64_t* window_idx) {
  // Back from the last window: each of its frames learns where it begins.
  for (int last = num_frames - 1; last >= 0;) {
    const int begin = first[last];
    for (int t = begin; t < last; ++t) first[t] = begin;
    last = begin - 1;
  }
  int64_t window = -1;
  for (int t = 0; t < max_frames; ++t) {
    if (t < num_frames) window += first[t] == t;
    window_idx[t] = t < num_frames ? window : -1;
  }
}

void static_windows_cpu(const StaticWindowsArgs& args);
int static_windows_cuda(const StaticWindowsArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
