// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// What a kernel compiled as C++ calls in place of the GPU. Everything here is a thin door to runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __SANITIZE_THREAD__
// The race build: compiled with -fsanitize=thread, its calls answered by race.cpp. The doors themselves stay unseen.
#define SIMT_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define SIMT_UNSEEN
#endif
#ifdef __SANITIZE_ADDRESS__
// Before a call that does not return, AddressSanitizer cleans the host thread's stack, and a fiber is not on it.
#define SIMT_NORETURN
#else
#define SIMT_NORETURN [[noreturn]]
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

namespace simt {

// The part of a fiber and of its block that kernels read.
struct ThreadView {
  uint3 thread_idx;
  unsigned rank;  // x fastest
};
struct BlockView {
  uint3 block_idx;
  dim3 block_dim, grid_dim;
};
// __thread and initial-exec: one instruction per use of threadIdx, where thread_local makes two calls.
extern __thread const ThreadView* this_thread __attribute__((tls_model("initial-exec")));
extern __thread const BlockView* this_block __attribute__((tls_model("initial-exec")));

SIMT_UNSEEN inline uint3 thread_idx() { return this_thread->thread_idx; }
SIMT_UNSEEN inline uint3 block_idx() { return this_block->block_idx; }
SIMT_UNSEEN inline dim3 block_dim() { return this_block->block_dim; }
SIMT_UNSEEN inline dim3 grid_dim() { return this_block->grid_dim; }
SIMT_UNSEEN inline unsigned lane() { return this_thread->rank % 32; }

// A grid that remembers the line of the launch, for messages.
struct GridAt {
  dim3 grid;
  const char* file;
  int line;
  GridAt(dim3 grid_, const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE())
      : grid(grid_), file(file_), line(line_) {}
  template <typename Int, typename = std::enable_if_t<std::is_integral_v<Int>>>
  GridAt(Int x, const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE())
      : grid(static_cast<unsigned>(x)), file(file_), line(line_) {}
};

// Runs body(data) once per thread of the grid. 0, or an error whose text cudaGetErrorString then returns.
int launch_grid(const GridAt& grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* data,
                bool race_build);

template <typename Body>
int launch(const GridAt& grid, dim3 block, size_t shared_bytes, const Body& body) {
#ifdef __SANITIZE_THREAD__
  constexpr bool kRaceBuild = true;
#else
  constexpr bool kRaceBuild = false;
#endif
  return launch_grid(
      grid, block, shared_bytes, [](const void* data) { (*static_cast<const Body*>(data))(); }, &body, kRaceBuild);
}

const char* error_string(int error);  // of the calling thread's last failed launch

// Ends the launch with a message that names block and thread. Does not return.
SIMT_NORETURN void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned char* shared(size_t bytes_needed);  // the block's arena; an error if the launch gave less

// Barriers. The value is what all threads get.
enum class Barrier { kPlain, kOr, kAnd, kCount };
int barrier(Barrier kind, int predicate);
void named_barrier(int id, int num_threads, bool wait);
void fence();  // __threadfence, device wide

// A function of a warp: the last of the lanes in mask to arrive runs it for all, from everyone's in to everyone's out.
struct WarpCall {
  unsigned mask;
  const void* in[32];
  void* out[32];
};
struct WarpFunction {
  const char* name;
  void (*run)(WarpCall& call);
  bool orders_memory;  // only __syncwarp does: a shuffle is no fence
};
void warp_call(const WarpFunction& function, unsigned mask, const void* in, void* out);
unsigned active_mask();

void cp_async(void* smem, const void* gmem, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int groups_left);

// Tells the race detector of an access that the compiler did not see. Does nothing in the plain build.
enum class Access { kRead, kWrite, kAtomic };
void touch(const void* address, size_t bytes, Access access);
bool in_shared(const void* address, size_t bytes);

}  // namespace simt
