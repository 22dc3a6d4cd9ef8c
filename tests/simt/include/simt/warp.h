// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Warp functions of CUDA: shuffles, votes, matches, reductions.
#pragma once

#include <cstring>

#include "simt/core.h"

namespace simt {

template <typename T>
constexpr bool kShuffles =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, long> ||
    std::is_same_v<T, unsigned long> || std::is_same_v<T, long long> || std::is_same_v<T, unsigned long long> ||
    std::is_same_v<T, float> || std::is_same_v<T, double>;

enum class Shuffle { kIdx, kUp, kDown, kXor };

template <typename T>
struct ShuffleIn {
  T value;
  int argument, width;
};

// The lane that a lane reads, as the PTX ISA defines shfl.sync; its own where that lane is outside its group.
inline int shuffle_source(Shuffle kind, int lane, int argument, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1;
  int from = lane;
  switch (kind) {
    case Shuffle::kIdx:
      return first + (argument & (width - 1));
    case Shuffle::kUp:
      from = lane - (argument & 31);
      return from >= first ? from : lane;
    case Shuffle::kDown:
      from = lane + (argument & 31);
      return from <= last ? from : lane;
    case Shuffle::kXor:
      from = lane ^ (argument & 31);
      return from <= last ? from : lane;
  }
  return lane;
}

template <typename T, Shuffle kKind>
SIMT_UNSEEN void run_shuffle(WarpCall& call) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(call.mask >> lane & 1)) continue;
    const auto& in = *static_cast<const ShuffleIn<T>*>(call.in[lane]);
    if (in.width < 1 || in.width > 32 || (in.width & (in.width - 1))) {
      fail("shuffle: expected width a power of two up to 32, got %d", in.width);
    }
    const int from = shuffle_source(kKind, lane, in.argument, in.width);
    if (!(call.mask >> from & 1)) {
      fail("shuffle: lane %d reads lane %d, which mask %08x does not name", lane, from, call.mask);
    }
    *static_cast<T*>(call.out[lane]) = static_cast<const ShuffleIn<T>*>(call.in[from])->value;
  }
}

template <Shuffle kKind, typename T>
SIMT_UNSEEN T shuffle(unsigned mask, T value, int argument, int width) {
  static_assert(kShuffles<T>, "CUDA shuffles int, unsigned, (unsigned) long, (unsigned) long long, float and double");
  static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  static constexpr WarpFunction kFunction{kNames[static_cast<int>(kKind)], &run_shuffle<T, kKind>, false};
  const ShuffleIn<T> in{value, argument, width};
  T out;
  warp_call(kFunction, mask, &in, &out);
  return out;
}

// Gives op(values of all lanes in mask, in lane order) to each of them.
template <typename T, typename Op>
SIMT_UNSEEN void run_reduce(WarpCall& call) {
  T all{};
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(call.mask >> lane & 1)) continue;
    const T value = *static_cast<const T*>(call.in[lane]);
    all = first ? value : Op()(all, value);
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (call.mask >> lane & 1) *static_cast<T*>(call.out[lane]) = all;
  }
}
template <typename Op, typename T>
SIMT_UNSEEN T reduce(unsigned mask, T value) {
  static constexpr WarpFunction kFunction{Op::kName, &run_reduce<T, Op>, false};
  T out;
  warp_call(kFunction, mask, &value, &out);
  return out;
}
#define SIMT_OP(Name, cuda_name, expression)        \
  struct Name {                                     \
    static constexpr const char* kName = cuda_name; \
    template <typename T>                           \
    SIMT_UNSEEN T operator()(T a, T b) const {      \
      return expression;                            \
    }                                               \
  }
SIMT_OP(ReduceAdd, "__reduce_add_sync", a + b);
SIMT_OP(ReduceMin, "__reduce_min_sync", b < a ? b : a);
SIMT_OP(ReduceMax, "__reduce_max_sync", a < b ? b : a);
SIMT_OP(ReduceAnd, "__reduce_and_sync", a& b);
SIMT_OP(ReduceOr, "__reduce_or_sync", a | b);
SIMT_OP(ReduceXor, "__reduce_xor_sync", a ^ b);
SIMT_OP(Ballot, "__ballot_sync", a | b);
SIMT_OP(Any, "__any_sync", a | b);
SIMT_OP(All, "__all_sync", a& b);
#undef SIMT_OP

template <typename T>
SIMT_UNSEEN void run_match_any(WarpCall& call) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(call.mask >> lane & 1)) continue;
    unsigned same = 0;
    for (int other = 0; other < 32; ++other) {
      if ((call.mask >> other & 1) && std::memcmp(call.in[lane], call.in[other], sizeof(T)) == 0) same |= 1u << other;
    }
    *static_cast<unsigned*>(call.out[lane]) = same;
  }
}
template <typename T>
SIMT_UNSEEN unsigned match_any(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA matches values of 4 or 8 bytes");
  static constexpr WarpFunction kFunction{"__match_any_sync", &run_match_any<T>, false};
  unsigned out = 0;
  warp_call(kFunction, mask, &value, &out);
  return out;
}
template <typename T>
SIMT_UNSEEN unsigned match_all(unsigned mask, T value, int* pred) {
  static constexpr WarpFunction kFunction{"__match_all_sync", &run_match_any<T>, false};
  unsigned out = 0;
  warp_call(kFunction, mask, &value, &out);
  *pred = out == mask;
  return out == mask ? mask : 0;
}

inline void run_nothing(WarpCall&) {}
inline void sync_warp(unsigned mask) {
  static constexpr WarpFunction kFunction{"__syncwarp", &run_nothing, true};
  warp_call(kFunction, mask, nullptr, nullptr);
}

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle<simt::Shuffle::kIdx>(mask, value, source, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle<simt::Shuffle::kUp>(mask, value, static_cast<int>(delta), width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle<simt::Shuffle::kDown>(mask, value, static_cast<int>(delta), width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return simt::shuffle<simt::Shuffle::kXor>(mask, value, lane_mask, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::reduce<simt::Ballot>(mask, predicate ? 1u << simt::lane() : 0u);
}
inline int __any_sync(unsigned mask, int predicate) { return simt::reduce<simt::Any>(mask, predicate ? 1 : 0); }
inline int __all_sync(unsigned mask, int predicate) { return simt::reduce<simt::All>(mask, predicate ? 1 : 0); }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return simt::match_any(mask, value);
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* pred) {
  return simt::match_all(mask, value, pred);
}
inline int __reduce_add_sync(unsigned mask, int v) { return simt::reduce<simt::ReduceAdd>(mask, v); }
inline int __reduce_min_sync(unsigned mask, int v) { return simt::reduce<simt::ReduceMin>(mask, v); }
inline int __reduce_max_sync(unsigned mask, int v) { return simt::reduce<simt::ReduceMax>(mask, v); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) { return simt::reduce<simt::ReduceAdd>(mask, v); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) { return simt::reduce<simt::ReduceMin>(mask, v); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) { return simt::reduce<simt::ReduceMax>(mask, v); }
inline unsigned __reduce_and_sync(unsigned mask, unsigned v) { return simt::reduce<simt::ReduceAnd>(mask, v); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) { return simt::reduce<simt::ReduceOr>(mask, v); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v) { return simt::reduce<simt::ReduceXor>(mask, v); }
inline unsigned __activemask() { return simt::active_mask(); }
