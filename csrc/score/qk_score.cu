// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: K read once. Rows of K go straight from global memory into the registers of an mma: the index that a product
// sums over may run in any order as long as both operands agree on it, so lane t of a row takes 16 contiguous bytes of
// every 64, which are the k indices of two products. No shared memory and no barrier between K and its scores; a warp
// has 4 KiB under way. Query rows wait in shared memory in tiles of 16 (half-empty ones cost nothing: the tensor cores
// have time to spare). Where heads are summed, a block walks all of them for its keys, in their order.
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "score/qk_score.h"

namespace tokred {
namespace {

constexpr float kMinusInf = -__builtin_huge_valf();
constexpr int kWarps = kQkScoreThreads / kWarpSize;
constexpr int kRows = static_cast<int>(kQkScoreTileRows);

template <typename T, int kDim>
struct Tile {
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
struct Storage {
  T q[Tile<T, kDim>::kHeld][Tile<T, kDim>::kRow];
  float weight[Tile<T, kDim>::kHeld];  // of the row's head; only where heads are summed
  bool listed[kDim];                   // channels; only with use_channels
};

using Words = Pack<uint32_t, 4>;  // one load: 8 halves or 4 floats

// A row of queries among those that share a key head.
struct QueryRow {
  int64_t head, token;  // head: of the group
  bool exists;
};
__device__ inline QueryRow query_row(const QkScoreArgs& a, int64_t row) {
  if (!a.sum_heads) return {row / a.q_len, row % a.q_len, row < a.group() * a.q_len};
  const int64_t padded = (a.group() + kRows - 1) / kRows * kRows;
  return {row % padded, row / padded, row % padded < a.group()};
}

// Rows [first, first + rows) of the queries, rows a multiple of 16. What does not exist, or is not listed, is zero.
template <typename T, int kDim>
__device__ inline void block_stage_queries(const QkScoreArgs& a, int64_t batch_idx, int64_t kv_head, int64_t first,
                                           int rows, Storage<T, kDim>& s) {
  const int thread = thread_rank(), dim = static_cast<int>(a.k.dim);
  __syncthreads();  // the rows before are read by all
  if (a.use_channels) {
    const int64_t list = a.channel_heads == 1 ? 0 : kv_head * a.num_channels;
    for (int c = thread; c < kDim; c += kQkScoreThreads) {
      bool listed = false;
      for (int64_t i = 0; i < a.num_channels; ++i) listed |= a.channels[list + i] == c;
      s.listed[c] = listed;
    }
    __syncthreads();  // the list is complete
  }
  const T* q = static_cast<const T*>(a.q) + batch_idx * a.q_batch;
  for (int i = thread; i < rows * kDim; i += kQkScoreThreads) {
    const int r = i / kDim, c = i % kDim;
    const QueryRow row = query_row(a, first + r);
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
__device__ inline void load_key(const T* row, int dim, bool exists, bool wide, Words (&key)[Tile<T, kDim>::kLoads]) {
  using K = Tile<T, kDim>;
  const int t = lane_index() % 4;
#pragma unroll
  for (int l = 0; l < K::kLoads; ++l) {
    const int c = l * K::kStretch + t * K::kVec;
    if (wide) {
      key[l] = exists && c < dim ? load_pack<4>(reinterpret_cast<const uint32_t*>(row + c)) : Words{};
    } else {
      Pack<T, K::kVec> values;
#pragma unroll
      for (int i = 0; i < K::kVec; ++i) values.v[i] = exists && c + i < dim ? row[c + i] : T(0.f);
      key[l] = detail::bits_as<Words>(values);
    }
  }
}

// acc += 16 rows times 8 keys over one stretch; low and high are the lane's parts of rows g and g + 8.
template <typename T>
__device__ inline void add_products(float (&acc)[4], const Words& low, const Words& high, const Words& key) {
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

// Where a block works.
struct Place {
  int64_t batch_idx, kv_head, chunk, first_key;
  int num_keys;
};
__device__ inline Place locate(const QkScoreArgs& a, const QkScorePolicy& p) {
  unsigned rest = blockIdx.x;
  Place at{0, 0, 0, 0, 0};
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
  at.num_keys = static_cast<int>(min(a.kv_len - at.first_key, p.keys_per_block));
  return at;
}

// acc of one tile of rows and 8 keys from key on (of the block) to out. readable: bit 4 i says whether key i exists.
__device__ inline void write_tile(const QkScoreArgs& a, const Place& at, int64_t first_row, int key, unsigned readable,
                                  const float (&acc)[4]) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const int64_t rows = a.group() * a.q_len;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t row = first_row + g + 8 * (j / 2);
    const int in_tile = 2 * t + j % 2;
    if (row >= rows || key + in_tile >= at.num_keys) continue;
    const float score = readable >> (4 * in_tile) & 1 ? a.activate(acc[j] * a.scale) : kMinusInf;
    a.out[((at.batch_idx * a.num_kv_heads + at.kv_head) * rows + row) * a.kv_len + at.first_key + key + in_tile] =
        score;
  }
}

// The weighted sum over the tile's rows, heads of one query, added to sum[key]: each entry belongs to one lane.
__device__ inline void warp_add_tile(const QkScoreArgs& a, const float* weight, int heads, const float (&acc)[4],
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
__global__ void __launch_bounds__(kQkScoreThreads, Tile<T, kDim>::kBlocksPerSm)
    qk_score_kernel(const QkScoreArgs a, const QkScorePolicy policy, const bool wide) {
  using K = Tile<T, kDim>;
  TOKRED_SHARED_BYTES(shared);
  Storage<T, kDim>& s = *reinterpret_cast<Storage<T, kDim>*>(shared);
  // Where heads are summed: [q_len, keys_per_block].
  float* sum = reinterpret_cast<float*>(shared + shared_tail_offset<Storage<T, kDim>>());
  const Place at = locate(a, policy);
  const int thread = thread_rank(), lane = lane_index(), g = lane / 4, t = lane % 4;
  const int dim = static_cast<int>(a.k.dim), keys_per_block = static_cast<int>(policy.keys_per_block);
  const int64_t limit = min(kv_limit(a.kv_lens, a.kv_len, at.batch_idx), at.first_key + at.num_keys);
  if (a.sum_heads) {
    for (int i = thread; i < static_cast<int>(a.q_len) * keys_per_block; i += kQkScoreThreads) sum[i] = 0.f;
  }
  const int64_t last_head = a.sum_heads ? a.num_kv_heads : at.kv_head + 1;
  const int64_t last_chunk = a.sum_heads ? policy.chunks : at.chunk + 1;
  for (int64_t head = at.kv_head; head < last_head; ++head) {
    const T* k = static_cast<const T*>(a.k.data) + a.k.head_offset(at.batch_idx, head);
    for (int64_t chunk = at.chunk; chunk < last_chunk; ++chunk) {
      const int64_t first_row = chunk * K::kHeld;
      const int rows = static_cast<int>(min(policy.rows - first_row, int64_t{K::kHeld}) + kRows - 1) / kRows * kRows;
      block_stage_queries(a, at.batch_idx, head, first_row, rows, s);
      for (int key = warp_index() * K::kKeys; key < at.num_keys; key += kWarps * K::kKeys) {
        Words values[K::kKeyTiles][K::kLoads];
        unsigned readable[K::kKeyTiles];
#pragma unroll
        for (int n = 0; n < K::kKeyTiles; ++n) {
          const int64_t position = at.first_key + key + 8 * n + g;
          const int32_t slot = position < limit ? a.pages.slot(at.batch_idx, position) : -1;
          readable[n] = __ballot_sync(kFullMask, slot >= 0);
          load_key<T, kDim>(k + a.k.slot_offset(max(slot, 0), a.pages.shift), dim, slot >= 0, wide, values[n]);
        }
        for (int tile = 0; tile < rows; tile += kRows) {
          float acc[K::kKeyTiles][4] = {};
#pragma unroll
          for (int l = 0; l < K::kLoads; ++l) {
            const int c = l * K::kStretch + t * K::kVec;
            const Words low = load_pack<4>(reinterpret_cast<const uint32_t*>(&s.q[tile + g][c]));
            const Words high = load_pack<4>(reinterpret_cast<const uint32_t*>(&s.q[tile + g + 8][c]));
#pragma unroll
            for (int n = 0; n < K::kKeyTiles; ++n) add_products<T>(acc[n], low, high, values[n][l]);
          }
#pragma unroll
          for (int n = 0; n < K::kKeyTiles; ++n) {
            if (!a.sum_heads) {
              write_tile(a, at, first_row + tile, key + 8 * n, readable[n], acc[n]);
            } else {
              const QueryRow row = query_row(a, first_row + tile);
              const int heads = static_cast<int>(min(a.group() - row.head, int64_t{kRows}));
              warp_add_tile(a, s.weight + tile, heads, acc[n], sum + row.token * keys_per_block + key + 8 * n);
            }
          }
        }
      }
    }
  }
  if (!a.sum_heads) return;
  __syncthreads();  // all sums are complete
  for (int key = thread; key < at.num_keys; key += kQkScoreThreads) {
    const int64_t position = at.first_key + key;
    const bool exists = position < limit && a.pages.slot(at.batch_idx, position) >= 0;
    for (int64_t token = 0; token < a.q_len; ++token) {
      a.out[(at.batch_idx * a.q_len + token) * a.kv_len + position] =
          exists ? sum[token * keys_per_block + key] : kMinusInf;
    }
  }
}

}  // namespace

int qk_score_cuda(const QkScoreArgs& a, CUstream_st* stream) {
  if (a.num_q_heads == 0 || a.q_len == 0) return cudaSuccess;
  const QkScorePolicy policy = choose_policy(a);
  const int64_t blocks = num_blocks(a, policy);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool wide = has_wide_rows(a.k, a.dtype);
  const size_t sums = a.sum_heads ? static_cast<size_t>(a.q_len * policy.keys_per_block) * sizeof(float) : 0;
  int error = cudaErrorInvalidValue;
  dispatch_float(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    (void)dispatch_int<64, 128, 256>(policy.tile_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      error = launch(qk_score_kernel<T, kDim>, dim3(static_cast<unsigned>(blocks)), dim3(kQkScoreThreads),
                     shared_bytes_with_tail<Storage<T, kDim>>(sums), stream, a, policy, wide);
    });
  });
  return error;
}

}  // namespace tokred
