// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Row by row work on a panel of logits, for attn_received_cpu.cpp.
#pragma once
#include <limits>

#include "common/vector_math.h"
#include "score/attn_received.h"

namespace tokred {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The products of a tile's rows with the keys of a panel, of which row r sees those that seen_in gives.
struct PanelView {
  float* data;
  int64_t keys;  // also the stride
  int64_t rows, first_key;
  const KeySpan* sees;
};
struct ColumnSpan {  // columns [begin, end) of a panel
  int64_t begin, end;
};
TOKRED_INLINE ColumnSpan seen_in(const PanelView& p, int64_t r) {
  const int64_t begin = p.sees[r].begin - p.first_key, end = p.sees[r].end - p.first_key;
  return {begin < 0 ? 0 : begin, end < p.keys ? end : p.keys};
}
// A row's last elements, filled up to kLanes with -inf.
TOKRED_INLINE void load_tail(const float* row, int64_t count, float (&tail)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) tail[i] = -kInf;
  for (int64_t i = 0; i < count; ++i) tail[i] = row[i];
}

// Products x of keys seen become logits on the base-2 scale: scale * x or cap * tanh(scale * x / cap), unless cap is 0,
// plus bias, unless that is null.
inline TOKRED_CLONES void adjust(const PanelView& panel, float scale, float cap, const float* bias) {
  const float over_cap = scale / cap;
  for (int64_t r = 0; r < panel.rows; ++r) {
    const ColumnSpan seen = seen_in(panel, r);
    float* row = panel.data + r * panel.keys;
    if (cap > 0) {
      for (int64_t c = seen.begin; c < seen.end; ++c) row[c] = cap * poly_tanh(row[c] * over_cap);
    } else {
      for (int64_t c = seen.begin; c < seen.end; ++c) row[c] *= scale;
    }
    if (bias) {
      for (int64_t c = seen.begin; c < seen.end; ++c) row[c] += bias[c] * kLog2e;
    }
  }
}

// Raises offset to the maximum of each row times scale; NaN is ignored here and met again in the sum.
inline TOKRED_CLONES void raise_offsets(const PanelView& panel, float scale, float* offset) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    const ColumnSpan seen = seen_in(panel, r);
    if (seen.begin >= seen.end) continue;
    const float* row = panel.data + r * panel.keys + seen.begin;
    const int64_t count = seen.end - seen.begin;
    float lanes[kLanes], tail[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = -kInf;
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
      for (int i = 0; i < kLanes; ++i) lanes[i] = row[c + i] > lanes[i] ? row[c + i] : lanes[i];
    }
    if (c < count) {
      load_tail(row + c, count - c, tail);
      for (int i = 0; i < kLanes; ++i) lanes[i] = tail[i] > lanes[i] ? tail[i] : lanes[i];
    }
    const float highest = scale * max_lanes(lanes);
    offset[r] = highest > offset[r] ? highest : offset[r];
  }
}

// x[r] becomes what it is when terms are 2^(logit - to[r]) instead of 2^(logit - from[r]).
inline TOKRED_CLONES void change_offset(const float* from, const float* to, int64_t rows, float* x) {
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = poly_exp2(from[r] - to[r]);
    x[r] *= from[r] == to[r] ? 1.f : factor;  // both may be infinite
  }
}

// Products of keys seen become 2^(scale * product - offset); their sum is added to sum.
inline TOKRED_CLONES void exponentiate(const PanelView& panel, float scale, const float* offset, float* sum) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    const ColumnSpan seen = seen_in(panel, r);
    if (seen.begin >= seen.end) continue;
    float* row = panel.data + r * panel.keys + seen.begin;
    const int64_t count = seen.end - seen.begin;
    // A row of -inf has offset -inf: with 0 in its place the exponentials are 0, not NaN.
    const float minus = offset[r] == -kInf ? 0.f : offset[r];
    float lanes[kLanes] = {}, tail[kLanes];
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        const float e = poly_exp2(scale * row[c + i] - minus);
        row[c + i] = e;
        lanes[i] += e;
      }
    }
    if (c < count) {
      load_tail(row + c, count - c, tail);
      for (int i = 0; i < kLanes; ++i) {
        tail[i] = poly_exp2(scale * tail[i] - minus);
        // Beyond the tail: 0, or NaN if the offset is; the row's other terms are NaN then, too.
        lanes[i] += tail[i];
      }
      for (int64_t i = 0; c + i < count; ++i) row[c + i] = tail[i];
    }
    sum[r] += sum_lanes(lanes);
  }
}

// columns[c] += factor * e, or the maximum of both (NaN if either is), over the rows and the keys each sees; e is the
// panel or, when kExp, 2^(scale * panel - offset).
template <bool kMax, bool kExp>
TOKRED_CLONES void add_columns(const PanelView& panel, int64_t first_row, int64_t last_row, float scale,
                               const float* offset, const float* factor, float* __restrict columns) {
  for (int64_t r = first_row; r < last_row; ++r) {
    const ColumnSpan seen = seen_in(panel, r);
    const float* __restrict row = panel.data + r * panel.keys;
    const float f = factor[r], minus = offset[r];
    for (int64_t c = seen.begin; c < seen.end; ++c) {
      const float p = f * (kExp ? poly_exp2(scale * row[c] - minus) : row[c]);
      const float greater = p > columns[c] ? p : columns[c];
      columns[c] = kMax ? (p == p ? greater : p) : columns[c] + p;
    }
  }
}

// out := part 0, then part 1 and so on added to it, or their maximum.
inline TOKRED_CLONES void merge_parts(const float* parts, int64_t num_parts, int64_t stride, int64_t n, bool max,
                                      float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = parts[i];
  for (int64_t p = 1; p < num_parts; ++p) {
    const float* part = parts + p * stride;
    if (max) {
      for (int64_t i = 0; i < n; ++i) out[i] = part[i] > out[i] || part[i] != part[i] ? part[i] : out[i];
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] += part[i];
    }
  }
}

}  // namespace tokred
