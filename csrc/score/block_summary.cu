// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A thread takes 16 bytes of columns of one block of tokens and walks its rows in their order: neighbouring threads
// read a row together, and eight loads are under way in each.
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "score/block_summary.h"

namespace tokred {
namespace {

constexpr float kInf = __builtin_huge_valf();
constexpr int kAhead = 8;  // rows that are loaded before they are used

template <typename T, int kVec, bool kMinMax>
__global__ void __launch_bounds__(kBlockSummaryThreads) block_summary_kernel(const BlockSummaryArgs a) {
  const int64_t chunks = a.dim / kVec, i = int64_t{blockIdx.x} * kBlockSummaryThreads + threadIdx.x;
  const int64_t row = i / chunks, column = i % chunks * kVec;
  if (row >= a.batch_size * a.num_heads * a.num_blocks) return;
  const int64_t batch_idx = row / a.num_blocks / a.num_heads;
  const TokenSpan span = a.block(batch_idx, row % a.num_blocks);
  const T* k = static_cast<const T*>(a.k) + batch_idx * a.k_batch + row / a.num_blocks % a.num_heads * a.k_head +
               span.begin * a.k_token + column;
  float low[kVec], high[kVec];  // low is the sum for means
#pragma unroll
  for (int c = 0; c < kVec; ++c) {
    low[c] = kMinMax && span.len > 0 ? kInf : 0.f;
    high[c] = span.len > 0 ? -kInf : 0.f;
  }
  for (int64_t t = 0; t < span.len; t += kAhead) {
    Pack<T, kVec> x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      x[u] = load_pack<kVec>(k + min(t + u, span.len - 1) * a.k_token);  // beyond the end the last row again: no branch
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (t + u >= span.len) break;
#pragma unroll
      for (int c = 0; c < kVec; ++c) {
        const float value = static_cast<float>(x[u].v[c]);
        if constexpr (kMinMax) {  // NaN replaces a number, and no number replaces NaN
          low[c] = value < low[c] || value != value ? value : low[c];
          high[c] = value > high[c] || value != value ? value : high[c];
        } else {
          low[c] += value;
        }
      }
    }
  }
  Pack<T, kVec> result;
#pragma unroll
  for (int c = 0; c < kVec; ++c) {
    result.v[c] = T(kMinMax || span.len == 0 ? low[c] : low[c] / static_cast<float>(span.len));
  }
  store_pack(static_cast<T*>(a.low) + row * a.dim + column, result);
  if constexpr (kMinMax) {
#pragma unroll
    for (int c = 0; c < kVec; ++c) result.v[c] = T(high[c]);
    store_pack(static_cast<T*>(a.high) + row * a.dim + column, result);
  }
}

}  // namespace

int block_summary_cuda(const BlockSummaryArgs& a, CUstream_st* stream) {
  int error = cudaErrorInvalidValue;
  dispatch_float(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWide = 16 / sizeof(T);
    const KvTensor rows{a.k, a.dim, a.k_batch, a.k_head, 0, a.k_token};
    const auto run = [&](auto kernel, int64_t vec) {
      const int64_t blocks = ceil_div<int64_t>(a.num_rows() * (a.dim / vec), kBlockSummaryThreads);
      if (blocks > INT32_MAX) return static_cast<int>(cudaErrorInvalidConfiguration);
      return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kBlockSummaryThreads), 0, stream, a);
    };
    if (has_wide_rows(rows, a.dtype)) {
      error =
          a.high ? run(block_summary_kernel<T, kWide, true>, kWide) : run(block_summary_kernel<T, kWide, false>, kWide);
    } else {
      error = a.high ? run(block_summary_kernel<T, 1, true>, 1) : run(block_summary_kernel<T, 1, false>, 1);
    }
  });
  return error;
}

}  // namespace tokred
