// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// What a warp does together, and vector loads. Every warp_ function is called by all 32 lanes of the warp. Reductions
// over kWidth < 32 work in each group of kWidth consecutive lanes. The order of additions is fixed (a butterfly, equal
// bits in every lane), so two runs agree bit for bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace tokred {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The index of the calling thread in its block, x fastest, as CUDA numbers threads into warps.
__device__ inline int thread_rank() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
__device__ inline int lane_index() { return thread_rank() % kWarpSize; }
__device__ inline int warp_index() { return thread_rank() / kWarpSize; }
__device__ inline int num_threads_in_block() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // of a NaN and a number, the number
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return max(a, b);
  }
};
struct Min {  // of a NaN and a number, the number
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return min(a, b);
  }
};

// T is float, double, or an integer of 32 or 64 bits; op is commutative. Valid in every lane.
template <int kWidth = kWarpSize, typename T, typename Op>
__device__ inline T warp_reduce(T value, Op op) {
  static_assert(kWidth > 0 && kWidth <= kWarpSize && (kWidth & (kWidth - 1)) == 0, "a power of two up to 32");
  constexpr bool kOneInstruction = kWidth == kWarpSize && (std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  if constexpr (kOneInstruction && std::is_same_v<Op, Add>) {
    return __reduce_add_sync(kFullMask, value);
  } else if constexpr (kOneInstruction && std::is_same_v<Op, Max>) {
    return __reduce_max_sync(kFullMask, value);
  } else if constexpr (kOneInstruction && std::is_same_v<Op, Min>) {
    return __reduce_min_sync(kFullMask, value);
  } else {
#pragma unroll
    for (int offset = kWidth / 2; offset > 0; offset /= 2) {
      value = op(value, __shfl_xor_sync(kFullMask, value, offset));
    }
    return value;
  }
}

// Valid in every lane.
template <int kWidth = kWarpSize, typename T>
__device__ inline T warp_sum(T value) {
  return warp_reduce<kWidth>(value, Add());
}
// Valid in every lane. NaN is ignored unless all are NaN.
template <int kWidth = kWarpSize, typename T>
__device__ inline T warp_max(T value) {
  return warp_reduce<kWidth>(value, Max());
}
// Valid in every lane. NaN is ignored unless all are NaN.
template <int kWidth = kWarpSize, typename T>
__device__ inline T warp_min(T value) {
  return warp_reduce<kWidth>(value, Min());
}

// Each lane's own value plus those of the lanes below it. Valid in every lane.
template <typename T>
__device__ inline T warp_inclusive_scan(T value) {
  const int lane = lane_index();
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const T below = __shfl_up_sync(kFullMask, value, static_cast<unsigned>(offset));
    if (lane >= offset) value += below;
  }
  return value;
}

// The largest b in [0, last] with before(b) <= value, where before grows and before(0) <= value. Valid in every lane.
template <typename Before>
__device__ inline int warp_search(int last, int64_t value, const Before& before) {
  int low = 0, count = last + 1;
  while (count > 1) {
    const int step = (count + kWarpSize - 1) / kWarpSize, at = low + lane_index() * step;
    const unsigned votes = __ballot_sync(kFullMask, at < low + count && before(at) <= value);
    const int passed = max(__popc(votes) - 1, 0) * step;
    low += passed;
    count = min(step, count - passed);
  }
  return low;
}

// kVec values of T, moved by one load or store of sizeof(T) * kVec bytes (1 to 16), which is also the alignment.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  static_assert(kVec > 0 && (kVec & (kVec - 1)) == 0 && sizeof(T) * kVec <= 16, "1, 2, 4, 8 or 16 bytes");
  T v[kVec];
};

namespace detail {
template <int kBytes>
struct Word;  // the built-in type of that many bytes: one memory instruction, whatever the compiler thinks of Pack
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <typename To, typename From>
__host__ __device__ inline To bits_as(From from) {  // by value: memcpy from memory would be one load per byte
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}
}  // namespace detail

// p is aligned to sizeof(T) * kVec bytes; global or shared memory.
template <int kVec, typename T>
__device__ inline Pack<T, kVec> load_pack(const T* p) {
  using Word = typename detail::Word<sizeof(T) * kVec>::type;
  return detail::bits_as<Pack<T, kVec>>(*reinterpret_cast<const Word*>(p));
}
template <typename T, int kVec>
__device__ inline void store_pack(T* p, const Pack<T, kVec>& pack) {
  using Word = typename detail::Word<sizeof(T) * kVec>::type;
  *reinterpret_cast<Word*>(p) = detail::bits_as<Word>(pack);
}
// The same for global memory that is read or written once: it leaves the caches first.
template <int kVec, typename T>
__device__ inline Pack<T, kVec> load_pack_once(const T* p) {
  using Word = typename detail::Word<sizeof(T) * kVec>::type;
  return detail::bits_as<Pack<T, kVec>>(__ldcs(reinterpret_cast<const Word*>(p)));
}
template <typename T, int kVec>
__device__ inline void store_pack_once(T* p, const Pack<T, kVec>& pack) {
  using Word = typename detail::Word<sizeof(T) * kVec>::type;
  __stcs(reinterpret_cast<Word*>(p), detail::bits_as<Word>(pack));
}

}  // namespace tokred
