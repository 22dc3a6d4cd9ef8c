// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Run-time values to compile-time ones, for host C++ and nvcc alike.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

struct CUstream_st;  // a cudaStream_t points to it; named here so that no header needs the CUDA runtime

// For the few helpers that host code and kernels share.
#if defined(__CUDACC__)
#define TOKRED_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TOKRED_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace tokred {

enum class DType : int8_t { kF32, kF16, kBF16 };

template <typename T>
struct Tag {
  using type = T;
};

// The library's one list of floating dtypes: f(Tag<T>{}).
template <typename F>
void dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(Tag<float>{});
    case DType::kF16:
      return f(Tag<c10::Half>{});
    case DType::kBF16:
      return f(Tag<c10::BFloat16>{});
  }
}

// f(std::integral_constant<int, v>{}) if v is one of Vs; false when it is none of them, and f was not called.
template <int... Vs, typename F>
[[nodiscard]] bool dispatch_int(int v, F&& f) {
  return ((v == Vs && (f(std::integral_constant<int, Vs>{}), true)) || ...);
}

constexpr int64_t element_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

template <typename T>
TOKRED_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// An index tensor as it came: int32 or int64. One branch per element; the widening is exact.
struct IndexPtr {
  const void* data = nullptr;
  bool is_int64 = true;

  TOKRED_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : int64_t{static_cast<const int32_t*>(data)[i]};
  }
};

}  // namespace tokred
