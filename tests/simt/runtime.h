// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// The inside of the emulator: what runtime.cpp (scheduler, errors) and race.cpp (race detector) share.
//
// A Worker belongs to one thread of the host and runs one block at a time; a Fiber is one CUDA thread. A fiber runs
// until it waits (barrier, warp function) or ends. What may run is in a queue; an empty queue with fibers alive is a
// deadlock, so nothing ever hangs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "simt/core.h"

namespace simt {

struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
  unsigned group;
};

struct Fiber : ThreadView {
  void* sp = nullptr;  // where to go on
  bool done = false;
  const char* waits_for = nullptr;  // null while it may run
  unsigned waits_mask = 0;
  void* waits_at = nullptr;  // an address in the kernel
  std::vector<AsyncCopy> copies;
  unsigned group = 0;  // of cp.async, the open one

  // Race detector. Times are values of one counter that grows at every synchronisation.
  uint32_t now = 0;         // the last synchronisation of this thread
  uint32_t knows[32] = {};  // per lane of the warp: everything that it did before then is ordered before what we do
  bool fenced = false;
};

struct Gathering {                 // lanes on their way into one call of a warp function
  unsigned mask = 0, arrived = 0;  // no mask: a free place
  const WarpFunction* function = nullptr;
  WarpCall call;
};

struct Warp {
  unsigned exists = 0, exited = 0;
  std::vector<Gathering> in_flight;
  std::vector<uint32_t> knows;  // race detector: the same for other warps, by named barriers; empty until one is used
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  std::vector<unsigned> members;  // ranks, those that wait and those that only arrived
  std::vector<unsigned> waiting;
};

struct Worker : BlockView {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  NamedBarrier named[16];
  std::vector<unsigned> queue;  // a ring of ranks
  std::vector<unsigned> order;  // scratch of a barrier
  size_t queue_head = 0, queue_size = 0;
  Fiber* current = nullptr;  // null: the scheduler runs
  void* scheduler_sp = nullptr;
  unsigned num_threads = 0, live = 0;
  uint64_t random = 1;
  uint64_t block_linear = 0;
  bool failed = false;
  std::string message;

  // __syncthreads
  unsigned waiting = 0;
  Barrier kind = Barrier::kPlain;
  int votes = 0, result = 0;

  // Memory: shared ends at a guard page, each stack begins at one.
  unsigned char* arena_map = nullptr;
  unsigned char* arena = nullptr;
  size_t arena_bytes = 0;
  unsigned char* stacks = nullptr;
  size_t num_stacks = 0;
  unsigned char* emergency_stack = nullptr;
  void* fault_pc = nullptr;
  uintptr_t fault_address = 0;

  void (*body)(const void*) = nullptr;
  const void* data = nullptr;
};

extern __thread Worker* worker __attribute__((tls_model("initial-exec")));
constexpr size_t kStackBytes = 256 << 10;  // with its guard; only what is touched is ever backed by memory
constexpr size_t kGuardBytes = 64 << 10;   // more than a frame, or a large one would step over it
constexpr size_t kArenaBytes = 99 << 10;   // the largest block of compute capabilities 8.6 and 8.9
constexpr size_t kPage = 4096;

std::string place_of(const Fiber& fiber);  // "thread (3,0,0)"
std::string line_of(void* pc);             // "file.cu:12", or the offset in the library
SIMT_NORETURN void fail_at(void* pc, const char* format, ...) __attribute__((format(printf, 2, 3)));

// race.cpp; all of them return at once in the plain build.
extern bool race_build;
void race_launch_start();
void race_block_start(Worker& w);
void race_barrier(Worker& w);
void race_sync_warp(Worker& w, unsigned warp, unsigned mask);
void race_named_barrier(Worker& w, const NamedBarrier& barrier);
void race_touch(const void* address, size_t bytes, Access access, void* pc);
void race_async_issued(const void* address, size_t bytes);  // contents undefined until written again

}  // namespace simt
