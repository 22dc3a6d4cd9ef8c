// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: similarities read, a byte per token written: a launch. One block per video, since the dynamic programme goes
// frame by frame: all threads look for runs of static positions that begin at a frame, then offer all windows that do.
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "merge/static_windows.h"

namespace tokred {
namespace {

struct WindowStorage {
  int32_t count[kMaxWindowFrames];  // of positions whose run of static frames began already and reaches this frame
  int32_t best[kMaxWindowFrames];   // see offer_window
  int32_t first[kMaxWindowFrames];
};

// grid: batch_size.
__global__ void __launch_bounds__(kStaticWindowsThreads) static_windows_kernel(const StaticWindowsArgs args) {
  TOKRED_SHARED(WindowStorage, shared);
  const int64_t b = blockIdx.x, positions = args.num_positions;
  const int thread = static_cast<int>(threadIdx.x), frames = frames_of(args, b);
  const float* similarity = args.similarity + b * (args.num_frames - 1) * positions;
  uint8_t* is_static = args.is_static + b * args.num_frames * positions;
  // Whether position p stays as it is from frame t to the next one.
  const auto stays = [&](int t, int64_t p) { return similarity[t * positions + p] > args.threshold; };

  for (int t = thread; t < frames; t += kStaticWindowsThreads) {
    shared.count[t] = 0;
    shared.best[t] = -1;
  }
  __syncthreads();  // all frames are empty
  for (int begin = 0; begin < frames; ++begin) {
    for (int64_t base = 0; base < positions; base += kStaticWindowsThreads) {
      const int64_t p = base + thread;
      bool runs = p < positions && (begin == 0 || !stays(begin - 1, p));
      for (int t = begin + 1; t < frames; ++t) {
        runs = runs && stays(t - 1, p);
        const unsigned lanes = __ballot_sync(kFullMask, runs);
        if (lanes == 0) break;
        if (lane_index() == 0) atomicAdd(&shared.count[t], __popc(lanes));
      }
    }
    __syncthreads();  // all runs that begin here are counted
    const int32_t before = begin == 0 ? 0 : shared.best[begin - 1];
    const int64_t end = min(int64_t{frames}, begin + args.max_window);
    for (int last = begin + thread; last < end; last += kStaticWindowsThreads) {
      const int32_t gain = last == begin ? 0 : shared.count[last] * (last - begin);
      offer_window(before + gain, begin, last, shared.best, shared.first);
    }
    __syncthreads();  // all windows that begin here are offered
  }
  if (thread == 0) {
    args.num_saved[b] = frames == 0 ? 0 : shared.best[frames - 1];
    number_windows(frames, args.num_frames, shared.first, args.window_idx + b * args.num_frames);
  }
  __syncthreads();  // first[t] is where the window of frame t begins
  for (int64_t p = thread; p < positions; p += kStaticWindowsThreads) {
    for (int last = static_cast<int>(args.num_frames) - 1; last >= 0;) {
      const int begin = last < frames ? shared.first[last] : last;
      bool runs = begin < last;
      for (int t = begin; t < last; ++t) runs = runs && stays(t, p);
      for (int t = begin; t <= last; ++t) is_static[t * positions + p] = runs;
      last = begin - 1;
    }
  }
}

}  // namespace

int static_windows_cuda(const StaticWindowsArgs& args, CUstream_st* stream) {
  return launch(static_windows_kernel, dim3(static_cast<unsigned>(args.batch_size)), dim3(kStaticWindowsThreads),
                sizeof(WindowStorage), stream, args);
}

}  // namespace tokred
