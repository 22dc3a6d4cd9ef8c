// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Stands in for the CUDA header when a .cu file is compiled as C++: the names that tokred's kernels use, and no more.
#pragma once

#ifndef TOKRED_SIMT
#error "this header is the emulator's: compile with -DTOKRED_SIMT, or put the CUDA toolkit's include directory first"
#endif

#include <math.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/atomics.h"
#include "simt/core.h"
#include "simt/intrinsics.h"
#include "simt/mma.h"
#include "simt/warp.h"

// ---- keywords. __noinline__ is not among them: as a macro it breaks libstdc++.
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static_assert(false, "use TOKRED_SHARED")
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

#define threadIdx (simt::thread_idx())
#define blockIdx (simt::block_idx())
#define blockDim (simt::block_dim())
#define gridDim (simt::grid_dim())
constexpr int warpSize = 32;

inline void __syncthreads() { simt::barrier(simt::Barrier::kPlain, 0); }
inline int __syncthreads_or(int predicate) { return simt::barrier(simt::Barrier::kOr, predicate); }
inline int __syncthreads_and(int predicate) { return simt::barrier(simt::Barrier::kAnd, predicate); }
inline int __syncthreads_count(int predicate) { return simt::barrier(simt::Barrier::kCount, predicate); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() {}  // orders, but does not wait: no order for the race detector
SIMT_NORETURN inline void __trap() { simt::fail("__trap()"); }

// ---- the host side
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return simt::error_string(error); }
inline const char* cudaGetErrorName(cudaError_t error) { return simt::error_string(error); }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes) std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A small made-up device of compute capability 8.0 with the shared memory of 8.6 and 8.9, which run its code.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 99 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 100 << 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
  }
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
