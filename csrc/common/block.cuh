// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// What a block does together. Every block_ function is called by all threads of the block, whose size is a multiple of
// 32 and at most 1024; none has exited. Each ends with a barrier, so the scratch may be reused at once, and each orders
// memory as __syncthreads() does. Fixed order of additions: two runs agree bit for bit.
#pragma once

#include "common/warp.cuh"

namespace tokred {

// A member of the kernel's shared storage. One is enough for any number of calls.
struct BlockScratch {
  unsigned long long per_warp[kWarpSize];
};

namespace detail {
template <typename T>
__device__ inline T* per_warp(BlockScratch& scratch) {
  static_assert(sizeof(T) <= sizeof(scratch.per_warp[0]), "at most 8 bytes per warp");
  return reinterpret_cast<T*>(scratch.per_warp);
}
}  // namespace detail

// Valid in every thread. T is float, double, or an integer of 32 or 64 bits; op is commutative. The lanes that have no
// warp to stand for contribute filler(value of warp 0): something that op leaves alone.
template <typename T, typename Op, typename Filler>
__device__ inline T block_reduce(T value, Op op, Filler filler, BlockScratch& scratch) {
  T* partial = detail::per_warp<T>(scratch);
  value = warp_reduce(value, op);
  if (lane_index() == 0) partial[warp_index()] = value;
  __syncthreads();  // all partials are written
  const int num_warps = num_threads_in_block() / kWarpSize;
  value = warp_reduce(lane_index() < num_warps ? partial[lane_index()] : filler(partial[0]), op);
  __syncthreads();  // all partials are read
  return value;
}

struct FillZero {
  template <typename T>
  __device__ T operator()(T) const {
    return T(0);
  }
};
struct FillSame {  // for ops that leave a repeated value alone
  template <typename T>
  __device__ T operator()(T value) const {
    return value;
  }
};

// Valid in every thread.
template <typename T>
__device__ inline T block_sum(T value, BlockScratch& scratch) {
  return block_reduce(value, Add(), FillZero(), scratch);
}

// Valid in every thread. NaN is ignored unless all are NaN.
template <typename T>
__device__ inline T block_max(T value, BlockScratch& scratch) {
  return block_reduce(value, Max(), FillSame(), scratch);
}

// Valid in every thread. NaN is ignored unless all are NaN.
template <typename T>
__device__ inline T block_min(T value, BlockScratch& scratch) {
  return block_reduce(value, Min(), FillSame(), scratch);
}

// The sum of the values of all warps with a lower index, each warp's the same in its lanes. Valid in every thread; so
// is *total, the sum over the block.
template <typename T>
__device__ inline T block_exclusive_scan_of_warps(T value, BlockScratch& scratch, T* total) {
  T* sum_of_warp = detail::per_warp<T>(scratch);
  if (lane_index() == 0) sum_of_warp[warp_index()] = value;
  __syncthreads();  // the sums of all warps are written
  const int num_warps = num_threads_in_block() / kWarpSize;
  const T sums = warp_inclusive_scan(lane_index() < num_warps ? sum_of_warp[lane_index()] : T(0));
  const T before = __shfl_sync(kFullMask, sums, warp_index() == 0 ? 0 : warp_index() - 1);
  *total = __shfl_sync(kFullMask, sums, num_warps - 1);
  __syncthreads();  // the sums of all warps are read
  return warp_index() == 0 ? T(0) : before;
}

// The sum of the values of all threads with a lower rank. Valid in every thread; so is *total, the sum over the block.
template <typename T>
__device__ inline T block_exclusive_scan(T value, BlockScratch& scratch, T* total) {
  const T inclusive = warp_inclusive_scan(value);
  const T of_warp = __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
  return block_exclusive_scan_of_warps(of_warp, scratch, total) + inclusive - value;
}

// A barrier among num_threads threads of the block (a multiple of 32, whole warps), id 1 to 15; 0 is __syncthreads().
// Orders memory among them. arrive does not wait: for the producers of a producer and consumer pair.
__device__ inline void named_barrier_sync(int id, int num_threads) {
#ifdef TOKRED_SIMT
  simt::named_barrier(id, num_threads, /*wait=*/true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#endif
}
__device__ inline void named_barrier_arrive(int id, int num_threads) {
#ifdef TOKRED_SIMT
  simt::named_barrier(id, num_threads, /*wait=*/false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#endif
}

}  // namespace tokred
