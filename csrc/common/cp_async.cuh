// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Copies from global to shared memory that run while the thread goes on (cp.async, sm_80 and up). A thread's copies
// since its last commit form a group; after cp_async_wait<N>() all but its N newest groups have landed *for that
// thread*: other threads read them after a barrier that follows the wait. Between issue and landing the destination has
// no defined contents; the emulator poisons it.
//
//   prologue: for each of kNumStages - 1 tiles { cp_async_16(...); cp_async_commit(); }
//   loop:     cp_async_wait<kNumStages - 2>(); __syncthreads();  // tile i is there, and tile i - 1 is read by all
//             issue tile i + kNumStages - 1 (into the stage of tile i - 1); cp_async_commit();  // also when empty
//             compute on tile i
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tokred {

namespace detail {
template <int kBytes>
__device__ inline void cp_async(void* smem, const void* gmem, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async moves");
#ifdef TOKRED_SIMT
  simt::cp_async(smem, gmem, kBytes, valid);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  const int from_bytes = valid ? kBytes : 0;  // the rest is filled with zeros
  if constexpr (kBytes == 16) {               // .cg passes by L1, and exists for 16 bytes only
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(gmem), "r"(from_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(gmem), "n"(kBytes), "r"(from_bytes)
                 : "memory");
  }
#endif
}
}  // namespace detail

// Both addresses are aligned to the size. When !valid, zeros are written and gmem is not read, so it may point
// anywhere.
__device__ inline void cp_async_16(void* smem, const void* gmem, bool valid = true) {
  detail::cp_async<16>(smem, gmem, valid);
}
__device__ inline void cp_async_8(void* smem, const void* gmem, bool valid = true) {
  detail::cp_async<8>(smem, gmem, valid);
}
__device__ inline void cp_async_4(void* smem, const void* gmem, bool valid = true) {
  detail::cp_async<4>(smem, gmem, valid);
}

// Closes the calling thread's group of copies. A group may be empty.
__device__ inline void cp_async_commit() {
#ifdef TOKRED_SIMT
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of the calling thread's groups are still under way. 0: all committed groups have landed.
template <int N>
__device__ inline void cp_async_wait() {
#ifdef TOKRED_SIMT
  simt::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace tokred
