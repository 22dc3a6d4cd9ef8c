// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Tests of the kernels without torch, for tools that Python would drown: valgrind, compute-sanitizer. One source, three
// flavours of the program (tests/cpp/cpp_tests.cmake), and in each the same call is made twice and compared:
//   cpu       the CPU kernels on one thread and on three, bit for bit; every buffer has its exact size
//   emulator  the CPU kernel and the CUDA kernel on tests/simt
//   cuda      the CPU kernel and the CUDA kernel on the GPU; buffers are cudaMalloc's, one each
// What results should be is the business of the Python tests. Here every path that a policy can choose is run.
#pragma once
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/dispatch.h"

namespace tokred::test {

// Where a call is made.
struct Side {
  bool on_device;  // the CUDA kernel
  int threads;     // of the CPU kernel
};

#if defined(TOKRED_SIMT) || defined(TOKRED_TEST_CUDA)
#define TOKRED_TEST_DEVICE 1
void check_launch(const char* op, int error);  // a cudaError_t; another one than success fails the test
#define TOKRED_RUN(side, op, args)                 \
  do {                                             \
    if ((side).on_device) {                        \
      check_launch(#op, op##_cuda(args, nullptr)); \
    } else {                                       \
      op##_cpu(args);                              \
    }                                              \
  } while (false)
#else
#define TOKRED_RUN(side, op, args) op##_cpu(args)
#endif

// Memory of exactly that many bytes on a side. Where there is a device it is poisoned first, or what an earlier call
// has left could pass for a result; TOKRED_CPP_POISON=0 leaves it as it comes, for initcheck. The cpu flavour has
// valgrind.
class Memory {
 public:
  Memory(const Side& side, size_t bytes);
  Memory(Memory&& other) noexcept : on_device_(other.on_device_), data_(std::exchange(other.data_, nullptr)) {}
  Memory& operator=(Memory&&) = delete;
  ~Memory();
  void fill(size_t at, const void* from, size_t bytes);
  void read(size_t at, void* to, size_t bytes) const;
  char* data() const { return static_cast<char*>(data_); }

 private:
  bool on_device_;
  void* data_;
};

// count values of T, lead of them before the first: an address that allows no wide load.
template <typename T>
class Buffer {
 public:
  Buffer(const Side& side, int64_t count, int64_t lead = 0)
      : count_(count), lead_(lead), memory_(side, static_cast<size_t>(count + lead) * sizeof(T)) {}
  Buffer(const Side& side, const std::vector<T>& values, int64_t lead = 0)
      : Buffer(side, static_cast<int64_t>(values.size()), lead) {
    memory_.fill(static_cast<size_t>(lead) * sizeof(T), values.data(), values.size() * sizeof(T));
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()) + lead_; }
  char* bytes() const { return memory_.data() + lead_ * static_cast<int64_t>(sizeof(T)); }
  std::vector<T> values() const {
    std::vector<T> out(static_cast<size_t>(count_));
    memory_.read(static_cast<size_t>(lead_) * sizeof(T), out.data(), out.size() * sizeof(T));
    return out;
  }

 private:
  int64_t count_, lead_;
  Memory memory_;
};

// What a call has written. Tolerances are those between CPU and CUDA; two thread counts agree bit for bit.
class Results {
 public:
  template <typename T>
  Results& add(const char* name, const Buffer<T>& buffer, double rtol = 0, double atol = 0) {
    Entry entry{name, {}, rtol, atol};
    for (const T value : buffer.values()) entry.values.push_back(static_cast<double>(value));
    entries_.push_back(std::move(entry));
    return *this;
  }

 private:
  struct Entry {
    std::string name;
    std::vector<double> values;
    double rtol, atol;
  };
  std::vector<Entry> entries_;
  friend void compare(const std::string& what, const Results& first, const Results& second, bool exact);
};

// Makes the call on both of the flavour's sides and compares; what names the case in a message.
void check(const std::string& what, const std::function<Results(const Side&)>& call);

// The same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t next();
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  float normal();  // near enough: mean 0, variance 1

  template <typename T>
  std::vector<T> normals(int64_t count) {
    return make<T>(count, [&] { return static_cast<T>(normal()); });
  }
  // Whole numbers in [low, high): sums and products of them are exact, and many are equal.
  template <typename T>
  std::vector<T> whole(int64_t count, int64_t low, int64_t high) {
    return make<T>(count, [&] {
      const int64_t value = low + below(high - low);
      if constexpr (std::is_integral_v<T>) {
        return static_cast<T>(value);
      } else {
        return static_cast<T>(static_cast<float>(value));
      }
    });
  }

 private:
  template <typename T, typename Make>
  static std::vector<T> make(int64_t count, const Make& one) {
    std::vector<T> values(static_cast<size_t>(count));
    for (T& value : values) value = one();
    return values;
  }
  uint64_t state_;
};

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};
inline const char* name_of(DType dtype) {
  return dtype == DType::kF32 ? "float32" : dtype == DType::kF16 ? "float16" : "bfloat16";
}
// One rounding to the dtype, and float32 sums in another order.
constexpr double rounding(DType dtype) { return dtype == DType::kF32 ? 2e-5 : dtype == DType::kF16 ? 0x1p-10 : 0x1p-7; }
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  const auto put = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      out += std::to_string(part);
    } else {
      out += part;
    }
  };
  (put(parts), ...);
  return out;
}

struct Register {
  Register(const char* op, const char* name, void (*body)());
};
// In FAMILY/test_NAME.cpp: TOKRED_TEST(prune_topk, ragged) { ... }
#define TOKRED_TEST(op, name)                                                            \
  static void op##_##name();                                                             \
  static const ::tokred::test::Register register_##op##_##name(#op, #name, op##_##name); \
  static void op##_##name()

}  // namespace tokred::test
