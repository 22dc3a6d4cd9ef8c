// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Float32 matrix products for the CPU kernels, without a torch header: csrc/torch/ points gemm_nt at ATen's product.
//
// A vendor product gives other bits for another shape, another alignment and another number of threads. So callers keep
// to three rules, and results then depend on none of them:
//   1. one fixed tile shape per op and depth: pad the last tile with zeros instead of shrinking it;
//   2. operands packed into AlignedBuffer scratch (half and bfloat16 are widened on the way, which is exact);
//   3. call it only inside parallel_for_gemm, where the product runs on the calling thread alone.
#pragma once
#include <cstdint>
#include <functional>

#include "common/dispatch.h"
#include "common/parallel.h"

namespace tokred {

// c[m, n] = a[m, depth] * b[n, depth]^T; all contiguous, 64-byte aligned.
using GemmNT = void (*)(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t depth);
extern const GemmNT gemm_nt;

// parallel_for over [0, n) with grain 1, always inside a parallel region (a single task would otherwise run outside of
// one, where the product may use several threads). body is never called for the padding task.
inline void parallel_for_gemm(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  parallel_for(n < 2 ? 2 : n, 1, [&](int64_t begin, int64_t end) {
    if (end > n) end = n;
    if (begin < end) body(begin, end);
  });
}

// rows x depth of src (any row stride, last dim contiguous), widened to float32, times scale; rows up to padded_rows
// and columns up to padded_depth are zeros.
template <typename T>
TOKRED_CLONES void pack_rows(const T* src, int64_t stride_row, int64_t rows, int64_t depth, int64_t padded_rows,
                             int64_t padded_depth, float scale, float* dst) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    float* out = dst + r * padded_depth;
    int64_t c = 0;
    if (r < rows) {
      const T* row = src + r * stride_row;
      for (; c < depth; ++c) out[c] = static_cast<float>(row[c]) * scale;
    }
    for (; c < padded_depth; ++c) out[c] = 0.f;
  }
}

}  // namespace tokred
