// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Rows are shared out over the threads; each pair is read once, in vectors of 16, into four sums. Two pairs are reduced
// together, as the reduction takes eight vectors.
#include "score/row_similarity.h"

#include "common/vec16.h"

namespace tokred {
namespace {

TOKRED_INLINE void add_products(const Vec16& x, const Vec16& y, Vec16 (&sums)[4]) {
  const Vec16 difference = x - y;
  sums[0] += x * y;
  sums[1] += x * x;
  sums[2] += y * y;
  sums[3] += difference * difference;
}

template <typename T>
TOKRED_INLINE void add_row(const T* x, const T* y, int64_t dim, Vec16* out) {
  Vec16 sums[4] = {}, u, v;
  int64_t c = 0;
  for (; c + 2 * kVecLanes <= dim; c += 2 * kVecLanes) {
    Vec16 u_high, v_high;
    load32(x + c, u, u_high);
    load32(y + c, v, v_high);
    add_products(u, v, sums);
    add_products(u_high, v_high, sums);
  }
  if (c + kVecLanes <= dim) {
    load16(x + c, u);
    load16(y + c, v);
    add_products(u, v, sums);
    c += kVecLanes;
  }
  if (c < dim) {
    load_part(x + c, dim - c, u);
    load_part(y + c, dim - c, v);
    add_products(u, v, sums);
  }
  for (int s = 0; s < 4; ++s) out[s] = sums[s];
}

template <typename T>
TOKRED_CLONES void compare_rows(const RowSimilarityArgs& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x.data);
  const T* y = static_cast<const T*>(a.y.data);
  for (int64_t row = begin; row < end; row += 2) {
    const int64_t count = std::min<int64_t>(2, end - row);
    Vec16 sums[8] = {};
    for (int64_t j = 0; j < count; ++j) {
      add_row(x + a.offset(a.x, row + j), y + a.offset(a.y, row + j), a.dim, sums + 4 * j);
    }
    float total[8];
    sum_lanes8(sums, total);
    for (int64_t j = 0; j < count; ++j) {
      const float* t = total + 4 * j;
      write_similarity(a, row + j, {t[0], t[1], t[2], t[3]});
    }
  }
}

}  // namespace

void row_similarity_cpu(const RowSimilarityArgs& a) {
  const int64_t bytes = 2 * a.dim * element_size(a.dtype);
  parallel_for(a.num_rows(), 1 + (int64_t{256} << 10) / (bytes + 64), [&](int64_t begin, int64_t end) {
    dispatch_float(a.dtype, [&](auto tag) { compare_rows<typename decltype(tag)::type>(a, begin, end); });
  });
}

}  // namespace tokred
