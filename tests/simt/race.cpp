// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// The race detector. Kernels compiled with -fsanitize=thread call __tsan_read4(address) and the like before each
// access; these are ours, and the sanitizer's runtime is not linked.
//
// One counter, the time, grows at each synchronisation. Every byte that a kernel touches has a cell: who wrote it last
// and who read it last, and the time of that thread's last synchronisation before. What a thread did since time t is
// ordered before us if we know it up to a later time: because of a __syncthreads of the block after t (floor), of a
// __syncwarp that joined our lanes (Fiber::knows) or of a named barrier that joined our warps (Warp::knows). Shuffles
// and votes order nothing, as in CUDA. An access of an earlier block of the launch is ordered if that block let go of a
// counter (fence, then atomic) that ours took hold of (atomic). Cells of earlier launches are too old to count, so
// nothing is ever cleared.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>

#include "runtime.h"

namespace simt {

bool race_build = false;

namespace {

struct Cell {                                  // no bit-fields: merging them costs more than the space
  uint32_t write_time, read_time, read_time2;  // 0: never
  uint16_t writer, reader, reader2;            // ranks
  bool atomic, pending;                        // the write was an atomic, or is a cp.async that may not have landed
};

uint32_t now = 0, launch_start = 0, block_start = 0, block_floor = 0;
std::vector<Cell> arena_cells(kArenaBytes + 16);

// Global memory: a page of cells per 4 KiB that a kernel touches.
constexpr unsigned kPageBits = 12;
std::unordered_map<uintptr_t, Cell*> pages;
uintptr_t last_page = 0;
Cell* last_cells = nullptr;

// The last-block pattern: which blocks (by their start) have let go of a counter, and which counters ours has taken.
std::unordered_map<const void*, std::vector<uint32_t>> released;
std::vector<const void*> acquired;
std::vector<std::pair<uint32_t, uint3>> block_starts;  // of this launch

Cell* cells_of(uintptr_t address) {
  const uintptr_t page = address >> kPageBits;
  if (page != last_page || !last_cells) {
    Cell*& cells = pages[page];
    if (!cells) {
      cells = static_cast<Cell*>(mmap(nullptr, sizeof(Cell) << kPageBits, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (cells == MAP_FAILED) {
        std::fprintf(stderr, "simt: no memory for the race detector\n");
        std::abort();
      }
    }
    last_page = page;
    last_cells = cells;
  }
  return last_cells + (address & ((uintptr_t{1} << kPageBits) - 1));
}

const std::pair<uint32_t, uint3>& block_at(uint32_t time) {
  auto after = std::upper_bound(block_starts.begin(), block_starts.end(), time,
                                [](uint32_t t, const auto& block) { return t < block.first; });
  return *(after - 1);
}

bool earlier_block_released(uint32_t time) {
  const uint32_t start = block_at(time).first;
  for (const void* counter : acquired) {
    const auto& blocks = released[counter];
    if (std::binary_search(blocks.begin(), blocks.end(), start)) return true;
  }
  return false;
}

// Whether what thread did since time is ordered before what fiber does now.
inline bool ordered(const Worker& w, const Fiber& fiber, bool is_shared, uint32_t time, unsigned thread) {
  if (time < (is_shared ? block_start : launch_start)) return true;
  if (time < block_start) return earlier_block_released(time);
  if (time < block_floor || thread == fiber.rank) return true;
  const unsigned warp = thread / 32, my_warp = fiber.rank / 32;
  if (warp == my_warp) return time < fiber.knows[thread % 32];
  const auto& knows = w.warps[my_warp].knows;
  return !knows.empty() && time < knows[warp];
}

SIMT_NORETURN void report(const Worker& w, const char* what, bool is_shared, const void* address, size_t bytes,
                          const char* other, uint32_t time, unsigned thread, void* pc) {
  char where[96];
  if (is_shared) {
    std::snprintf(where, sizeof(where), "byte %td of shared memory",
                  static_cast<const unsigned char*>(address) - w.arena);
  } else {
    std::snprintf(where, sizeof(where), "global memory at %p", address);
  }
  if (time < block_start) {
    const uint3 b = block_at(time).second;
    fail_at(pc, "race: %s (%zu bytes) of %s, %s by block (%u,%u,%u) of the same launch", what, bytes, where, other, b.x,
            b.y, b.z);
  }
  fail_at(pc, "race: %s (%zu bytes) of %s, %s by %s without a barrier between", what, bytes, where, other,
          place_of(w.fibers[thread]).c_str());
}

void check(Worker& w, Fiber& fiber, const void* address, size_t bytes, Access access, void* pc) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at - reinterpret_cast<uintptr_t>(w.stacks) < w.num_stacks * kStackBytes) return;  // a thread's own variables
  const auto map = reinterpret_cast<uintptr_t>(w.arena) - 2 * kPage;
  const bool is_shared = at - map < 3 * kPage + w.arena_bytes;
  if (is_shared && !in_shared(address, bytes)) {
    fail_at(pc, "shared memory out of bounds: byte %td of %zu", static_cast<const unsigned char*>(address) - w.arena,
            w.arena_bytes);
  }
  Cell* cell = is_shared ? arena_cells.data() + (at - reinterpret_cast<uintptr_t>(w.arena)) : nullptr;
  for (size_t i = 0; i < bytes; ++i) {
    if (!is_shared && (i == 0 || ((at + i) & ((uintptr_t{1} << kPageBits) - 1)) == 0)) cell = cells_of(at + i);
    Cell& c = *cell++;
    if (is_shared && access != Access::kWrite && c.write_time < block_start) {
      fail_at(pc, "shared memory is read that nobody wrote: byte %zu of %zu (%zu bytes)",
              at + i - reinterpret_cast<uintptr_t>(w.arena), w.arena_bytes, bytes);
    }
    const bool both_atomic = access == Access::kAtomic && c.atomic;
    if (!both_atomic && !ordered(w, fiber, is_shared, c.write_time, c.writer)) {
      report(w,
             access == Access::kRead    ? "read"
             : access == Access::kWrite ? "write"
                                        : "atomic",
             is_shared, address, bytes,
             c.atomic    ? "changed by an atomic"
             : c.pending ? "written by a cp.async"
                         : "written",
             c.write_time, c.writer, pc);
    }
    if (is_shared && c.pending && access != Access::kWrite) {  // ordered, but the copy may still be under way
      fail_at(pc, "shared memory is read before its cp.async was waited for: byte %zu of %zu",
              at + i - reinterpret_cast<uintptr_t>(w.arena), w.arena_bytes);
    }
    if (access == Access::kRead) {
      if (c.reader != fiber.rank || c.read_time < block_start) {
        c.reader2 = c.reader;
        c.read_time2 = c.read_time;
        c.reader = static_cast<uint16_t>(fiber.rank);
      }
      c.read_time = fiber.now;
      continue;
    }
    if (!ordered(w, fiber, is_shared, c.read_time, c.reader)) {
      report(w, access == Access::kWrite ? "write" : "atomic", is_shared, address, bytes, "read", c.read_time, c.reader,
             pc);
    }
    if (!ordered(w, fiber, is_shared, c.read_time2, c.reader2)) {
      report(w, access == Access::kWrite ? "write" : "atomic", is_shared, address, bytes, "read", c.read_time2,
             c.reader2, pc);
    }
    c.write_time = fiber.now;
    c.writer = static_cast<uint16_t>(fiber.rank);
    c.atomic = access == Access::kAtomic;
    c.pending = false;
  }
}

}  // namespace

void race_launch_start() {
  if (now > 0xf0000000u) {  // start over: one launch in billions pays
    for (auto& [page, cells] : pages) munmap(cells, sizeof(Cell) << kPageBits);
    pages.clear();
    last_cells = nullptr;
    std::fill(arena_cells.begin(), arena_cells.end(), Cell());
    now = 0;
  }
  if (pages.size() > 4096) {  // 320 MiB of cells
    for (auto& [page, cells] : pages) munmap(cells, sizeof(Cell) << kPageBits);
    pages.clear();
    last_cells = nullptr;
  }
  launch_start = ++now;
  released.clear();
  block_starts.clear();
}

void race_block_start(Worker& w) {
  if (!race_build) return;
  block_start = block_floor = ++now;
  block_starts.emplace_back(now, w.block_idx);
  acquired.clear();
  for (Fiber& fiber : w.fibers) {
    fiber.now = now;
    fiber.fenced = false;
    std::fill(fiber.knows, fiber.knows + 32, now);
  }
}

void race_barrier(Worker& w) {
  if (!race_build) return;
  block_floor = ++now;
  for (Fiber& fiber : w.fibers) fiber.now = now;
}

void race_sync_warp(Worker& w, unsigned warp, unsigned mask) {
  if (!race_build) return;
  ++now;
  Fiber* lanes = &w.fibers[32 * warp];
  uint32_t knows[32] = {};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (int other = 0; other < 32; ++other) knows[other] = std::max(knows[other], lanes[lane].knows[other]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) knows[lane] = now;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    std::copy(knows, knows + 32, lanes[lane].knows);
    lanes[lane].now = now;
  }
}

void race_named_barrier(Worker& w, const NamedBarrier& barrier) {
  if (!race_build) return;
  ++now;
  std::vector<uint32_t> knows(w.warps.size(), 0);
  for (unsigned rank : barrier.members) {
    const auto& of_warp = w.warps[rank / 32].knows;
    for (size_t i = 0; i < of_warp.size(); ++i) knows[i] = std::max(knows[i], of_warp[i]);
  }
  for (unsigned rank : barrier.members) knows[rank / 32] = now;
  for (unsigned rank : barrier.members) w.fibers[rank].now = now;
  for (unsigned rank : barrier.waiting) {  // who only arrived has learned nothing
    Fiber& fiber = w.fibers[rank];
    w.warps[rank / 32].knows = knows;
    std::fill(fiber.knows, fiber.knows + 32, now);
  }
}

void race_touch(const void* address, size_t bytes, Access access, void* pc) {
  if (!race_build) return;
  Worker& w = *worker;
  Fiber& fiber = *w.current;
  check(w, fiber, address, bytes, access, pc);
  if (access == Access::kAtomic && !in_shared(address, bytes)) {
    if (fiber.fenced) {
      auto& blocks = released[address];
      if (blocks.empty() || blocks.back() != block_start) blocks.push_back(block_start);
    }
    if (acquired.empty() || acquired.back() != address) acquired.push_back(address);
  }
}

void race_async_issued(const void* address, size_t bytes) {
  if (!race_build) return;
  Cell* cell = arena_cells.data() + (static_cast<const unsigned char*>(address) - worker->arena);
  for (size_t i = 0; i < bytes; ++i) cell[i].pending = true;
}

}  // namespace simt

// ---- what the compiler's instrumentation calls. Outside of a kernel, on any thread, they do nothing.

namespace {
inline void seen(const void* address, size_t bytes, simt::Access access, void* pc) {
  simt::Worker* w = simt::worker;
  if (w && w->current) simt::check(*w, *w->current, address, bytes, access, pc);
}
}  // namespace

#define SIMT_HOOK extern "C" __attribute__((visibility("hidden"), used))
#define SIMT_HOOKS(bytes)                                                                                            \
  SIMT_HOOK void __tsan_read##bytes(void* p) { seen(p, bytes, simt::Access::kRead, __builtin_return_address(0)); }   \
  SIMT_HOOK void __tsan_write##bytes(void* p) { seen(p, bytes, simt::Access::kWrite, __builtin_return_address(0)); } \
  SIMT_HOOK void __tsan_unaligned_read##bytes(void* p) {                                                             \
    seen(p, bytes, simt::Access::kRead, __builtin_return_address(0));                                                \
  }                                                                                                                  \
  SIMT_HOOK void __tsan_unaligned_write##bytes(void* p) {                                                            \
    seen(p, bytes, simt::Access::kWrite, __builtin_return_address(0));                                               \
  }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
SIMT_HOOK void __tsan_read_range(void* p, size_t bytes) {
  seen(p, bytes, simt::Access::kRead, __builtin_return_address(0));
}
SIMT_HOOK void __tsan_write_range(void* p, size_t bytes) {
  seen(p, bytes, simt::Access::kWrite, __builtin_return_address(0));
}
#ifndef TOKRED_SANITIZE  // else the sanitizer's own
// -fsanitize=bounds-strict: a thread's own array left by its index, which no guard page sees.
SIMT_HOOK void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  simt::fail_at(__builtin_return_address(0), "array index %zd out of bounds", static_cast<ptrdiff_t>(index));
}
#endif
SIMT_HOOK void __tsan_init() {}
SIMT_HOOK void __tsan_func_entry(void*) {}
SIMT_HOOK void __tsan_func_exit() {}
SIMT_HOOK void __tsan_vptr_update(void**, void*) {}
SIMT_HOOK void __tsan_vptr_read(void**) {}

// The host side of a .cu file may use std::atomic (shared_ptr does): its operations become calls, too.
#define SIMT_ATOMIC_HOOKS(bits, T)                                                                                  \
  SIMT_HOOK T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  SIMT_HOOK void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  SIMT_HOOK T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                                             \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                                 \
  SIMT_HOOK T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                                 \
  SIMT_HOOK T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                                 \
  SIMT_HOOK T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                                 \
  SIMT_HOOK T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) {                                             \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                 \
  SIMT_HOOK T __tsan_atomic##bits##_fetch_xor(volatile T* p, T v, int) {                                            \
    return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                                 \
  SIMT_HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {          \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }                                                                                                                 \
  SIMT_HOOK int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {            \
    return __atomic_compare_exchange_n(p, expected, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                   \
  }
SIMT_ATOMIC_HOOKS(8, unsigned char)
SIMT_ATOMIC_HOOKS(16, unsigned short)
SIMT_ATOMIC_HOOKS(32, unsigned)
SIMT_ATOMIC_HOOKS(64, unsigned long)
SIMT_HOOK void __tsan_atomic_thread_fence(int) {}
SIMT_HOOK void __tsan_atomic_signal_fence(int) {}
