// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// The one way to start a kernel and the one way to name its shared memory: on the GPU under nvcc, on fibers under the
// emulator (tests/simt, TOKRED_SIMT). A .cu file never writes <<<>>> or __shared__.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

// TOKRED_SHARED(Storage, name): names the block's shared memory as one struct; once per kernel, in the kernel itself.
//   Launch with shared_bytes = sizeof(Storage). Storage is trivially constructible and needs at most 16-byte alignment.
//   Nothing is initialised: the emulator fills the memory with 0xFF before each block.
// TOKRED_SHARED_TAIL(Storage, name): unsigned char* to the bytes after Storage, 16-byte aligned, for arrays whose size
// is
//   known at run time. Launch with shared_bytes = shared_bytes_with_tail<Storage>(tail_bytes).
// TOKRED_SHARED_BYTES(name): unsigned char* to all of the block's shared memory, 16-byte aligned, for kernels without a
//   struct.
#ifdef TOKRED_SIMT
#define TOKRED_SHARED_BYTES(name) unsigned char* const name = simt::shared(0)
#define TOKRED_SHARED(Storage, name) Storage& name = *reinterpret_cast<Storage*>(simt::shared(sizeof(Storage)))
#else
#define TOKRED_SHARED_BYTES(name)                                \
  extern __shared__ __align__(16) unsigned char tokred_shared[]; \
  unsigned char* const name = tokred_shared
#define TOKRED_SHARED(Storage, name)                             \
  extern __shared__ __align__(16) unsigned char tokred_shared[]; \
  Storage& name = *reinterpret_cast<Storage*>(tokred_shared)
#endif
#define TOKRED_SHARED_TAIL(Storage, name)            \
  TOKRED_SHARED_BYTES(tokred_shared_base_of_##name); \
  unsigned char* const name = tokred_shared_base_of_##name + ::tokred::shared_tail_offset<Storage>()

namespace tokred {

// Where the tail starts: sizeof(Storage) rounded up to 16 bytes.
template <typename Storage>
__host__ __device__ constexpr size_t shared_tail_offset() {
  static_assert(std::is_trivially_default_constructible<Storage>::value, "shared memory runs no constructors");
  static_assert(alignof(Storage) <= 16, "shared memory is 16-byte aligned");
  return (sizeof(Storage) + 15) / 16 * 16;
}

template <typename Storage>
__host__ __device__ constexpr size_t shared_bytes_with_tail(size_t tail_bytes) {
  return shared_tail_offset<Storage>() + tail_bytes;
}

// Starts kernel(args...) on the caller's stream and returns a cudaError_t as int. An empty grid is a success without a
// launch (CUDA calls it an error), so empty inputs need no case of their own. args are converted to the kernel's
// parameter types. The block has at most 1024 threads and, for warp functions with a full mask, a multiple of 32.
#ifdef TOKRED_SIMT
template <typename Kernel, typename... Args>
int launch(Kernel kernel, simt::GridAt grid, dim3 block, size_t shared_bytes, CUstream_st* stream,
           const Args&... args) {
  (void)stream;
  return simt::launch(grid, block, shared_bytes, [&] { kernel(args...); });
}
#else
template <typename Kernel, typename... Args>
int launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  // Above 48 KiB a kernel must ask. The calls cost well under a microsecond and are legal during graph capture; a
  // cached "already asked" would be state between calls. The attribute belongs to the kernel, not to this launch:
  // asking for the device's limit, always the same, keeps another thread's smaller launch from taking it back in
  // between.
  if (shared_bytes > 48 * 1024) {
    int device = 0, limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) {
      error = shared_bytes > static_cast<size_t>(limit)
                  ? cudaErrorInvalidValue
                  : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    }
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // or the next launch would report it as its own
      return error;
    }
  }
  // clang-format off: a formatter for C++ splits the brackets
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
  // clang-format on
  return cudaGetLastError();
}
#endif

}  // namespace tokred
