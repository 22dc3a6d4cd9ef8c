// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: K read once (common/qk_tile.cuh). A block has a stretch of the keys of one head; where heads are summed, it
// walks all of them for its keys, in their order.
#include "common/qk_tile.cuh"

namespace tokred {
namespace {

// Where a block works.
struct Place {
  int64_t batch_idx, kv_head, chunk, first_key;
  TokenSpan keys;  // of the batch entry
  int num_keys;    // of the block; none at all where sequences are shorter than the grid assumes
};
__device__ inline Place locate(const QkRows& a, const QkRowsPolicy& p) {
  unsigned rest = blockIdx.x;
  Place at{};
  if (!a.sum_heads) {  // chunks of the same keys side by side: the later ones find them in L2
    at.chunk = rest % static_cast<unsigned>(p.chunks);
    rest /= static_cast<unsigned>(p.chunks);
  }
  at.first_key = int64_t{rest % static_cast<unsigned>(p.key_blocks)} * p.keys_per_block;
  rest /= static_cast<unsigned>(p.key_blocks);
  if (!a.sum_heads) {
    at.kv_head = rest % static_cast<unsigned>(a.num_kv_heads);
    rest /= static_cast<unsigned>(a.num_kv_heads);
  }
  at.batch_idx = rest;
  at.keys = a.keys(at.batch_idx);
  at.num_keys = static_cast<int>(max(min(a.num_logits(at.keys) - at.first_key, p.keys_per_block), int64_t{0}));
  return at;
}

// The weighted sum over the tile's rows, heads of one query, added to sum[key]: each entry belongs to one lane.
__device__ inline void warp_add_tile(const QkRows& a, const float* weight, int heads, const float (&acc)[4],
                                     float* sum) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    // A row that does not exist is left out, not multiplied by 0: its product with an infinite key is NaN.
    float part = g < heads ? weight[g] * a.activate(acc[c] * a.scale) : 0.f;
    part += g + 8 < heads ? weight[g + 8] * a.activate(acc[c + 2] * a.scale) : 0.f;
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2) part += __shfl_xor_sync(kFullMask, part, offset);
    if (g == 0) sum[2 * t + c] += part;
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kQkRowsThreads, QkTile<T, kDim>::kBlocksPerSm)
    qk_rows_kernel(const QkRows a, const QkRowsPolicy policy, const bool wide) {
  using S = QkStorage<T, kDim>;
  TOKRED_SHARED_BYTES(shared);
  S& s = *reinterpret_cast<S*>(shared);
  // Where heads are summed: [q_len, keys_per_block].
  float* sum = reinterpret_cast<float*>(shared + shared_tail_offset<S>());
  const Place at = locate(a, policy);
  if (at.num_keys == 0) return;  // the whole block
  const int thread = thread_rank(), keys_per_block = static_cast<int>(policy.keys_per_block);
  const int64_t limit = min(at.keys.len, at.first_key + at.num_keys);
  if (a.sum_heads) {
    for (int i = thread; i < static_cast<int>(a.q_len) * keys_per_block; i += kQkRowsThreads) sum[i] = 0.f;
  }
  const int64_t last_head = a.sum_heads ? a.num_kv_heads : at.kv_head + 1;
  const int64_t last_chunk = a.sum_heads ? policy.chunks : at.chunk + 1;
  for (int64_t head = at.kv_head; head < last_head; ++head) {
    const T* k =
        static_cast<const T*>(a.k.data) + a.k.head_offset(at.batch_idx, head) + at.keys.begin * a.k.stride_token;
    for (int64_t chunk = at.chunk; chunk < last_chunk; ++chunk) {
      constexpr int kHeld = QkTile<T, kDim>::kHeld;
      const int64_t first_row = chunk * kHeld, group_rows = a.group() * a.q_len;
      const int rows =
          static_cast<int>(min(policy.rows - first_row, int64_t{kHeld}) + kQkTileRows - 1) / kQkTileRows * kQkTileRows;
      block_stage_queries(a, at.batch_idx, head, first_row, rows, s);
      float* out = a.out + a.logits_at(at.batch_idx, head * a.group(), at.keys) + at.first_key;
      block_multiply_keys(
          a, s, k, at.batch_idx, at.first_key, at.num_keys, limit, rows, wide,
          [&](int tile, int key, unsigned readable, const float (&acc)[4]) {
            if (!a.sum_heads) {
              thread_visit_tile(a, first_row + tile, group_rows, key, at.num_keys, readable, acc,
                                [&](int64_t row, int key, float score) { out[row * a.logits_stride() + key] = score; });
            } else {
              const QkQueryRow row = query_row(a, first_row + tile);
              const int heads = static_cast<int>(min(a.group() - row.head, int64_t{kQkTileRows}));
              warp_add_tile(a, s.weight + tile, heads, acc, sum + row.token * keys_per_block + key);
            }
          });
    }
  }
  if (!a.sum_heads) return;
  __syncthreads();  // all sums are complete
  for (int key = thread; key < at.num_keys; key += kQkRowsThreads) {
    const int64_t position = at.first_key + key;
    const bool exists = position < limit && a.pages.slot(at.batch_idx, position) >= 0;
    for (int64_t token = 0; token < a.q_len; ++token) {
      a.out[(at.batch_idx * a.q_len + token) * a.kv_len + position] =
          exists ? sum[token * keys_per_block + key] : -INFINITY;
    }
  }
}

}  // namespace

int qk_rows_cuda(const QkRows& a, CUstream_st* stream) {
  if (a.num_q_heads == 0 || a.q_len == 0) return cudaSuccess;
  const QkRowsPolicy policy = choose_qk_policy(a);
  const int64_t blocks = num_blocks(a, policy);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool wide = has_wide_rows(a.k, a.dtype);
  const size_t sums = a.sum_heads ? static_cast<size_t>(a.q_len * policy.keys_per_block) * sizeof(float) : 0;
  int error = cudaErrorInvalidValue;
  dispatch_float(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    (void)dispatch_int<64, 128, 256>(policy.tile_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      error = launch(qk_rows_kernel<T, kDim>, dim3(static_cast<unsigned>(blocks)), dim3(kQkRowsThreads),
                     shared_bytes_with_tail<QkStorage<T, kDim>>(sums), stream, a, policy, wide);
    });
  });
  return error;
}

}  // namespace tokred
