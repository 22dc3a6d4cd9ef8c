// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Atomic functions, real ones: blocks run on several threads of the host. Each returns the old value.
#pragma once

#include <cstring>

#include "simt/core.h"

namespace simt {

template <typename T>
struct Bits {
  using type = std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint64_t>>;
};

template <typename T, typename Op>
SIMT_UNSEEN T atomic(T* address, Op op) {
  using Word = typename Bits<T>::type;
  static_assert(sizeof(Word) == sizeof(T), "atomics have 2, 4 or 8 bytes");
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("atomic: misaligned address");
  touch(address, sizeof(T), Access::kAtomic);
  auto* word = reinterpret_cast<Word*>(address);
  Word before = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    T value, result;
    std::memcpy(&value, &before, sizeof(T));
    result = op(value);
    Word after;
    std::memcpy(&after, &result, sizeof(T));
    if (__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return value;
  }
}

}  // namespace simt

// A functor instead of a lambda, so that the race build does not instrument it.
#define SIMT_ATOMIC(name, T, expression)      \
  inline T name(T* address, T v) {            \
    struct Op {                               \
      T v;                                    \
      SIMT_UNSEEN T operator()(T old) const { \
        (void)old;                            \
        return expression;                    \
      }                                       \
    };                                        \
    return simt::atomic(address, Op{v});      \
  }
#define SIMT_ATOMIC_INTEGERS(name, expression) \
  SIMT_ATOMIC(name, int, expression)           \
  SIMT_ATOMIC(name, unsigned, expression)      \
  SIMT_ATOMIC(name, unsigned long long, expression)

SIMT_ATOMIC_INTEGERS(atomicAdd, old + v)
SIMT_ATOMIC(atomicAdd, float, old + v)
SIMT_ATOMIC(atomicAdd, double, old + v)
SIMT_ATOMIC(atomicSub, int, old - v)
SIMT_ATOMIC(atomicSub, unsigned, old - v)
SIMT_ATOMIC_INTEGERS(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicMax, long long, old < v ? v : old)
SIMT_ATOMIC_INTEGERS(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicMin, long long, v < old ? v : old)
SIMT_ATOMIC_INTEGERS(atomicAnd, old& v)
SIMT_ATOMIC_INTEGERS(atomicOr, old | v)
SIMT_ATOMIC_INTEGERS(atomicXor, old ^ v)
SIMT_ATOMIC_INTEGERS(atomicExch, v)
SIMT_ATOMIC(atomicExch, float, v)
SIMT_ATOMIC(atomicInc, unsigned, old >= v ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, unsigned, old == 0 || old > v ? v : old - 1)
#undef SIMT_ATOMIC_INTEGERS
#undef SIMT_ATOMIC

#define SIMT_ATOMIC_CAS(T)                                                       \
  inline T atomicCAS(T* address, T compare, T v) {                               \
    struct Op {                                                                  \
      T compare, v;                                                              \
      SIMT_UNSEEN T operator()(T old) const { return old == compare ? v : old; } \
    };                                                                           \
    return simt::atomic(address, Op{compare, v});                                \
  }
SIMT_ATOMIC_CAS(int)
SIMT_ATOMIC_CAS(unsigned)
SIMT_ATOMIC_CAS(unsigned long long)
SIMT_ATOMIC_CAS(unsigned short)
#undef SIMT_ATOMIC_CAS
