// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A block's products of queries, staged in shared memory, with rows of K. These go straight from global memory into the
// registers of an mma: the index that a product sums over may run in any order as long as both operands agree on it, so
// lane t of a row takes 16 contiguous bytes of every 64, which are the k indices of two products. No shared memory and
// no barrier between K and its logits; a warp has 4 KiB under way. Query rows wait in tiles of 16 (half-empty ones cost
// nothing: the tensor cores have time to spare). A logit's bits depend on its query and key alone.
#pragma once

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/qk_rows.h"

namespace tokred {

template <typename T, int kDim>
struct QkTile {
  static constexpr int kVec = 16 / sizeof(T);           // values of one load
  static constexpr int kStretch = 4 * kVec;             // columns that the four lanes of a row load together
  static constexpr int kLoads = kDim / kStretch;        // of a lane and row
  static constexpr int kKeyTiles = kLoads > 4 ? 1 : 2;  // of 8 keys, held in registers at a time
  static constexpr int kKeys = 8 * kKeyTiles;
  static constexpr int kBlocksPerSm = kLoads > 4 ? 2 : 3;         // registers for that many
  static constexpr int kHeld = kDim * sizeof(T) > 512 ? 32 : 64;  // rows of queries: rows_per_block of the policy
  // 64 bytes more than a multiple of 128: eight lanes that load 16 bytes each, of two rows, meet every bank once.
  static constexpr int kRow = kDim + kStretch;
};

template <typename T, int kDim>
struct QkStorage {
  T q[QkTile<T, kDim>::kHeld][QkTile<T, kDim>::kRow];
  float weight[QkTile<T, kDim>::kHeld];  // of the row's head; only where heads are summed
  bool listed[kDim];                     // channels; only with use_channels
};

using QkWords = Pack<uint32_t, 4>;  // one load: 8 halves or 4 floats

// A row of queries among those that share a key head.
struct QkQueryRow {
  int64_t head, token;  // head: of the group
  bool exists;
};
__device__ inline QkQueryRow query_row(const QkRows& a, int64_t row) {
  if (!a.sum_heads) return {row / a.q_len, row % a.q_len, row < a.group() * a.q_len};
  const int64_t padded = (a.group() + kQkTileRows - 1) / kQkTileRows * kQkTileRows;
  return {row % padded, row / padded, row % padded < a.group()};
}

// Rows [first, first + rows) of the queries, rows a multiple of 16. What does not exist, or is not listed, is zero.
template <typename T, int kDim>
__device__ inline void block_stage_queries(const QkRows& a, int64_t batch_idx, int64_t kv_head, int64_t first, int rows,
                                           QkStorage<T, kDim>& s) {
  const int thread = thread_rank(), dim = static_cast<int>(a.k.dim);
  __syncthreads();  // the rows before are read by all
  if (a.use_channels) {
    const int64_t list = a.channel_heads == 1 ? 0 : kv_head * a.num_channels;
    for (int c = thread; c < kDim; c += num_threads_in_block()) {
      bool listed = false;
      for (int64_t i = 0; i < a.num_channels; ++i) listed |= a.channels[list + i] == c;
      s.listed[c] = listed;
    }
    __syncthreads();  // the list is complete
  }
  const T* q = static_cast<const T*>(a.q) + batch_idx * a.q_batch;
  for (int i = thread; i < rows * kDim; i += num_threads_in_block()) {
    const int r = i / kDim, c = i % kDim;
    const QkQueryRow row = query_row(a, first + r);
    const bool read = row.exists && c < dim && (!a.use_channels || s.listed[c]);
    s.q[r][c] = read ? q[(kv_head * a.group() + row.head) * a.q_head + row.token * a.q_token + c] : T(0.f);
    if (a.sum_heads && c == 0) {
      s.weight[r] = row.exists ? a.weight(batch_idx, row.token, kv_head * a.group() + row.head) : 0.f;
    }
  }
  __syncthreads();  // all rows are staged
}

// The lane's part of one row of K; zeros beyond dim and where there is no row.
template <typename T, int kDim>
__device__ inline void load_key(const T* row, int dim, bool exists, bool wide,
                                QkWords (&key)[QkTile<T, kDim>::kLoads]) {
  using K = QkTile<T, kDim>;
  const int t = lane_index() % 4;
#pragma unroll
  for (int l = 0; l < K::kLoads; ++l) {
    const int c = l * K::kStretch + t * K::kVec;
    if (wide) {
      key[l] = exists && c < dim ? load_pack<4>(reinterpret_cast<const uint32_t*>(row + c)) : QkWords{};
    } else {
      Pack<T, K::kVec> values;
#pragma unroll
      for (int i = 0; i < K::kVec; ++i) values.v[i] = exists && c + i < dim ? row[c + i] : T(0.f);
      key[l] = detail::bits_as<QkWords>(values);
    }
  }
}

// acc += 16 rows times 8 keys over one stretch; low and high are the lane's parts of rows g and g + 8.
template <typename T>
__device__ inline void add_products(float (&acc)[4], const QkWords& low, const QkWords& high, const QkWords& key) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    if constexpr (sizeof(T) == 4) {
      const float a[4] = {__uint_as_float(low.v[i]), __uint_as_float(high.v[i]), __uint_as_float(low.v[i + 1]),
                          __uint_as_float(high.v[i + 1])};
      const float b[2] = {__uint_as_float(key.v[i]), __uint_as_float(key.v[i + 1])};
      mma_m16n8k8_3xtf32(acc, a, b);
    } else {
      const uint32_t a[4] = {low.v[i], high.v[i], low.v[i + 1], high.v[i + 1]};
      const uint32_t b[2] = {key.v[i], key.v[i + 1]};
      mma_m16n8k16<T>(acc, a, b);
    }
  }
}

// The products of the first rows of s.q with keys [first_key, first_key + num_keys) of the row of K that begins at k,
// of which those before limit may be read: emit(tile, key, readable, acc) for the 16 rows from tile on and the 8 keys
// from first_key + key on. The lane has rows tile + g and tile + g + 8 of keys 2 t and 2 t + 1 (g = lane / 4, t = lane
// % 4); bit 4 i of readable says whether key i exists. The warps of the block share the keys out.
template <typename T, int kDim, typename Emit>
__device__ inline void block_multiply_keys(const QkRows& a, QkStorage<T, kDim>& s, const T* k, int64_t batch_idx,
                                           int64_t first_key, int num_keys, int64_t limit, int rows, bool wide,
                                           const Emit& emit) {
  using K = QkTile<T, kDim>;
  const int lane = lane_index(), g = lane / 4, t = lane % 4, dim = static_cast<int>(a.k.dim);
  const int num_warps = num_threads_in_block() / kWarpSize;
  for (int key = warp_index() * K::kKeys; key < num_keys; key += num_warps * K::kKeys) {
    QkWords values[K::kKeyTiles][K::kLoads];
    unsigned readable[K::kKeyTiles];
#pragma unroll
    for (int n = 0; n < K::kKeyTiles; ++n) {
      const int64_t position = first_key + key + 8 * n + g;
      const int32_t slot = position < limit ? a.pages.slot(batch_idx, position) : -1;
      readable[n] = __ballot_sync(kFullMask, slot >= 0);
      load_key<T, kDim>(k + a.k.slot_offset(max(slot, 0), a.pages.shift), dim, slot >= 0, wide, values[n]);
    }
    for (int tile = 0; tile < rows; tile += kQkTileRows) {
      float acc[K::kKeyTiles][4] = {};
#pragma unroll
      for (int l = 0; l < K::kLoads; ++l) {
        const int c = l * K::kStretch + t * K::kVec;
        const QkWords low = load_pack<4>(reinterpret_cast<const uint32_t*>(&s.q[tile + g][c]));
        const QkWords high = load_pack<4>(reinterpret_cast<const uint32_t*>(&s.q[tile + g + 8][c]));
#pragma unroll
        for (int n = 0; n < K::kKeyTiles; ++n) add_products<T>(acc[n], low, high, values[n][l]);
      }
#pragma unroll
      for (int n = 0; n < K::kKeyTiles; ++n) emit(tile, key + 8 * n, readable[n], acc[n]);
    }
  }
}

// The lane's four scores of such a tile: f(row, key, score) for those that there are; -inf for a key that may not be
// read. rows, keys: how many there are.
template <typename F>
__device__ inline void thread_visit_tile(const QkRows& a, int64_t tile, int64_t rows, int key, int num_keys,
                                         unsigned readable, const float (&acc)[4], const F& f) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t row = tile + g + 8 * (j / 2);
    const int in_tile = 2 * t + j % 2;
    if (row >= rows || key + in_tile >= num_keys) continue;
    f(row, key + in_tile, readable >> (4 * in_tile) & 1 ? a.activate(acc[j] * a.scale) : -INFINITY);
  }
}

}  // namespace tokred
