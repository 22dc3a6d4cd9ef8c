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
  constexpr int64_t kTurn = 4 * kLine;
  const char *a = src[0], *b = src[1], *c = src[2], *d = src[3];
  const auto copy = [&](char* to, const char* from, int64_t at) __attribute__((always_inline)) {
    const Line line = *reinterpret_cast<const Line*>(from + at);
    *reinterpret_cast<Line*>(to + at) = line;
  };
  int64_t at = 0;
  for (; at + kTurn <= bytes; at += kTurn) {
    for (int64_t i = at; i < at + kTurn; i += kLine) copy(dst, a, i);
    for (int64_t i = at; i < at + kTurn; i += kLine) copy(dst + bytes, b, i);
    for (int64_t i = at; i < at + kTurn; i += kLine) copy(dst + 2 * bytes, c, i);
    for (int64_t i = at; i < at + kTurn; i += kLine) copy(dst + 3 * bytes, d, i);
  }
  if (at == bytes) return;
  for (int64_t r = 0; r < kRowsAtOnce; ++r) std::memcpy(dst + r * bytes + at, src[r] + at, size_t(bytes - at));
}

}  // namespace tokred
