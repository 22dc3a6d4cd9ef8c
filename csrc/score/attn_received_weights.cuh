// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// What the passes of attn_received do with a chunk of products: from products to logits, to sums of exponentials, to
// the weights that keys receive. All of it on accumulator fragments: acc[r / 2][i / 2][2 * (r % 2) + i % 2] is the
// product of own row 8 r + lane / 4 with streamed row 8 (i / 2) + 2 (lane % 4) + i % 2.
#pragma once
#include "common/exp_sum.cuh"
#include "score/attn_received_tiles.cuh"

namespace tokred {

__device__ inline void add_sink(ExpSum& x, const AttnReceivedArgs& a, int64_t head) {
  if (a.sink) x.merge(a.sink[head] * kLog2e, 1.f);
}

// Products become logits on the base-2 scale, softcap * tanh(product * scale / softcap) + bias[at(r, i)]: for those
// that are more than product times scale, which is left to whoever takes the exponential.
template <int kRowTiles, int kColTiles, typename At>
__device__ inline void thread_adjust(float (&acc)[kRowTiles][kColTiles][4], float scale, float softcap,
                                     const float* bias, const At& at) {
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2 * kColTiles; ++i) f(acc[r / 2][i / 2][2 * (r % 2) + i % 2], r, i);
    }
  };
  if (softcap > 0) {
    scale /= softcap;
    each([&](float& x, int, int) { x = tanhf(x * scale); });
    scale = softcap;
  }
  scale *= kLog2e;
  if (bias) {
    each([&](float& x, int r, int i) { x = x * scale + bias[at(r, i)] * kLog2e; });
  } else {
    each([&](float& x, int, int) { x *= scale; });
  }
}

// Products q k become the weights that the chunk's queries, columns of acc, give to the warp's keys; times scale they
// are logits. 0 from a query whose lse is -inf, and to keys outside of sees[column] where masked says that there may
// be some. One instruction or
// two per weight next to its exponential: all that is rare or the same in the whole warp stays out of the loop.
template <int kRowTiles, int kColTiles>
__device__ inline void thread_weigh(float (&acc)[kRowTiles][kColTiles][4], const float* lse, const float* weight,
                                    bool weighted, float scale, bool masked, int key0, const KeySpan* sees) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  bool check = masked;
#pragma unroll
  for (int i = 0; i < 2 * kColTiles; ++i) {
    const float from = lse[8 * (i / 2) + 2 * t + i % 2];
    check = check || from == -INFINITY;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      float& x = acc[r / 2][i / 2][2 * (r % 2) + i % 2];
      x = fast_exp2(x * scale - from * kLog2e);
    }
  }
  if (weighted) {
#pragma unroll
    for (int i = 0; i < 2 * kColTiles; ++i) {
      const float factor = weight[8 * (i / 2) + 2 * t + i % 2];
#pragma unroll
      for (int r = 0; r < 2 * kRowTiles; ++r) acc[r / 2][i / 2][2 * (r % 2) + i % 2] *= factor;
    }
  }
  if (!check) return;
#pragma unroll
  for (int i = 0; i < 2 * kColTiles; ++i) {
    const int column = 8 * (i / 2) + 2 * t + i % 2;
    const KeySpan span = lse[column] == -INFINITY ? KeySpan{0, 0} : sees[column];
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      if (!span.has(key0 + 8 * r + g)) acc[r / 2][i / 2][2 * (r % 2) + i % 2] = 0.f;
    }
  }
}

template <int kRowTiles, int kColTiles>
__device__ inline void thread_add(const float (&acc)[kRowTiles][kColTiles][4], bool max_reduce,
                                  float (&total)[2 * kRowTiles]) {
  if (max_reduce) {
#pragma unroll
    for (int i = 0; i < 2 * kColTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2 * kRowTiles; ++r) {
        total[r] = max_nan(total[r], acc[r / 2][i / 2][2 * (r % 2) + i % 2]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2 * kColTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2 * kRowTiles; ++r) total[r] += acc[r / 2][i / 2][2 * (r % 2) + i % 2];
    }
  }
}

}  // namespace tokred
