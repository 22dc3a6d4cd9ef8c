// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/copy_rows.h"

namespace tokred {

namespace {
// A cache line, so that the store queue covers as much memory as it can.
using Line = char __attribute__((vector_size(64), aligned(1), may_alias));
constexpr int64_t kLine = sizeof(Line);
}  // namespace

TOKRED_CLONES void copy_rows_at_once(char* dst, const char* const* src, int64_t bytes) {
  const char* from[kRowsAtOnce];
  for (int64_t r = 0; r < kRowsAtOnce; ++r) from[r] = src[r];
  constexpr int64_t kTurn = 2 * kLine;
  int64_t at = 0;
  for (; at + kTurn <= bytes; at += kTurn) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
#pragma GCC unroll 2
      for (int64_t i = at; i < at + kTurn; i += kLine) {
        *reinterpret_cast<Line*>(dst + r * bytes + i) = *reinterpret_cast<const Line*>(from[r] + i);
      }
    }
  }
  if (at == bytes) return;
  for (int64_t r = 0; r < kRowsAtOnce; ++r) std::memcpy(dst + r * bytes + at, from[r] + at, size_t(bytes - at));
}

}  // namespace tokred
