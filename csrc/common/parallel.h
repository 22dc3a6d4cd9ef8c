// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Threads and vector code for the CPU kernels, without a torch header: csrc/torch/ defines parallel_for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>

// A function with this attribute is compiled three times and chosen at load. It belongs on the loop itself, a function
// template or plain function: on a caller whose body is a dispatch lambda it would vectorise nothing. Helpers that such
// a function calls must be TOKRED_INLINE, or they keep the baseline's instructions.
#if defined(__x86_64__) && defined(__linux__) && !defined(TOKRED_SANITIZE) && !defined(TOKRED_SIMT)
#define TOKRED_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TOKRED_CLONES
#endif
#define TOKRED_INLINE inline __attribute__((always_inline))

namespace tokred {

// Calls body(begin, end) over [0, n) in pieces of at least grain, on torch's threads. Bodies must not throw.
using ParallelFor = void (*)(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
extern const ParallelFor parallel_for;

// Scratch for one thread: 64-byte aligned, uninitialised. By malloc, whose small blocks are at hand again at once;
// those of aligned_alloc are not.
template <typename T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t count) : block_(std::malloc(static_cast<size_t>(count) * sizeof(T) + kAlignment)) {
    if (!block_) throw std::bad_alloc();
    const uintptr_t first = reinterpret_cast<uintptr_t>(block_.get()) + kAlignment - 1;
    data_ = reinterpret_cast<T*>(first & ~(kAlignment - 1));
  }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr uintptr_t kAlignment = 64;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> block_;
  T* data_;
};

}  // namespace tokred
