// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: 2 * head_dim flops per logit and pass (two passes, one when the lse is given), one exponential per logit and
// pass, which binds at head_dim 64; K and Q from memory once per pass.
//
// Both passes are one product with exchanged roles. A warp holds its own rows (A fragments, whole depth) in registers; all
// warps of the block share a stream of tiles in shared memory. What is reduced runs along the stream, so it stays in the
// thread: pass 1 owns queries and streams keys (running maximum and sum), pass 2 owns keys and streams queries (column
// sums, head after head). Nothing meets in memory: no atomics, and the order of additions is fixed. The queries of a group
// of heads are rows side by side, so K is read once for all of them. Pass 1 cuts the keys into splits of fixed length.
#include "common/cp_async.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "score/attn_received.h"

#include <initializer_list>

namespace tokred {
namespace {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

template <typename T, int kDim>
struct Config {
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int kStep = kIsFloat ? 8 : 16;  // depth of one mma
  static constexpr int kSteps = kDim / kStep;
  static constexpr int kRowTiles = kIsFloat || kDim > 128 ? 1 : 2;  // as choose_attn_received_policy says
  static constexpr int kRowsPerWarp = 16 * kRowTiles;
  static constexpr int kMaxThreads = kIsFloat ? 128 : 256;
  // n8 tiles multiplied at a time: two where the own rows take many registers, to stay below 128.
  static constexpr int kColTiles = kDim > (kIsFloat ? 128 : 64) && (kIsFloat || kRowTiles == 2) ? 2 : 4;
  static constexpr int kChunk = 8 * kColTiles;
  static constexpr int kTile = !kIsFloat ? 64 : kDim > 128 ? 16 : 32;  // streamed rows per stage
  static constexpr int kStride = kDim + 16 / sizeof(T);  // rows 16 bytes apart modulo 128: no bank conflicts
  static constexpr int kStages = kIsFloat || kDim > 128 ? 2 : 3;
  static constexpr int kOwnRows = kIsFloat ? kMaxThreads / kWarpSize * kRowsPerWarp : 0;
};

template <typename T, int kDim>
struct Storage {
  using C = Config<T, kDim>;
  T tile[C::kStages][C::kTile][C::kStride];
  float lse[C::kStages][C::kTile], weight[C::kStages][C::kTile];  // pass 2
  T own[C::kOwnRows + 1][C::kStride];                             // float32: the warps' own rows
};

// The queries or keys of one head.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int count;
};

template <typename T>
__device__ inline Rows<T> query_rows(const AttnReceivedArgs& a, int64_t batch_idx, int64_t head_idx) {
  const T* q = static_cast<const T*>(a.q) + batch_idx * a.stride_q.batch + head_idx * a.stride_q.head;
  return {q, a.stride_q.token, static_cast<int>(a.q_len)};
}
template <typename T>
__device__ inline Rows<T> key_rows(const AttnReceivedArgs& a, int64_t batch_idx, int64_t kv_head_idx) {
  const T* k = static_cast<const T*>(a.k) + batch_idx * a.stride_k.batch + kv_head_idx * a.stride_k.head;
  return {k, a.stride_k.token, static_cast<int>(a.kv_len)};
}

// Rows [first, first + kTile) into a stage, zeros past the last row and past head_dim. aligned: by 16-byte copies that the
// caller commits and waits for; else by plain stores. The caller's barrier publishes both.
template <typename T, int kDim>
__device__ inline void block_load_tile(T (*tile)[Config<T, kDim>::kStride], const Rows<T>& rows, int first, int head_dim,
                                       bool aligned) {
  constexpr int kTile = Config<T, kDim>::kTile, kVec = 16 / sizeof(T), kVecs = kDim / kVec;
  if (aligned) {
    for (int i = thread_rank(); i < kTile * kVecs; i += num_threads_in_block()) {
      const int r = i / kVecs, c = i % kVecs * kVec;
      const bool valid = first + r < rows.count && c < head_dim;
      cp_async_16(&tile[r][c], rows.data + (valid ? (first + r) * rows.stride + c : 0), valid);
    }
  } else {
    for (int i = thread_rank(); i < kTile * kDim; i += num_threads_in_block()) {
      const int r = i / kDim, c = i % kDim;
      tile[r][c] = first + r < rows.count && c < head_dim ? rows.data[(first + r) * rows.stride + c] : T(0.f);
    }
  }
}

// A warp's own rows over the whole depth, 16-bit types: as A fragments in registers. row_at(r): the row, or null for zeros.
template <typename T, int kDim>
struct OwnRows {
  using C = Config<T, kDim>;
  uint32_t a[C::kRowTiles][C::kSteps][4];

  template <typename RowAt>
  __device__ void load(Storage<T, kDim>&, RowAt&& row_at, int head_dim, bool aligned) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
      const T* row[2] = {row_at(16 * m + g), row_at(16 * m + g + 8)};
#pragma unroll
      for (int s = 0; s < C::kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][s][i] = word(row[i % 2], 16 * s + 2 * t + 8 * (i / 2), head_dim, aligned);
      }
    }
  }

 private:
  __device__ static uint32_t word(const T* row, int c, int head_dim, bool aligned) {
    if (!row || c >= head_dim) return 0;
    if (aligned) return detail::bits_as<uint32_t>(load_pack<2>(row + c));
    Pack<T, 2> pair;
    pair.v[0] = row[c];
    pair.v[1] = c + 1 < head_dim ? row[c + 1] : T(0.f);
    return detail::bits_as<uint32_t>(pair);
  }
};

// float32: in shared memory, for a fragment is split into two tf32 each time and both would have to stay in registers.
// The block's next barrier publishes them to the warp.
template <int kDim>
struct OwnRows<float, kDim> {
  using C = Config<float, kDim>;
  const float (*rows)[C::kStride];

  template <typename RowAt>
  __device__ void load(Storage<float, kDim>& shared, RowAt&& row_at, int head_dim, bool) {
    float(*mine)[C::kStride] = shared.own + warp_index() * C::kRowsPerWarp;
    for (int r = 0; r < C::kRowsPerWarp; ++r) {
      const float* row = row_at(r);
      for (int c = lane_index(); c < kDim; c += kWarpSize) mine[r][c] = row && c < head_dim ? row[c] : 0.f;
    }
    rows = mine;
  }
};

// acc[m][n] = own rows 16 m .. times streamed rows 8 n .. of the chunk that starts at tile.
template <typename T, int kDim>
__device__ inline void warp_multiply(float (&acc)[Config<T, kDim>::kRowTiles][Config<T, kDim>::kColTiles][4],
                                     const OwnRows<T, kDim>& own, const T (*tile)[Config<T, kDim>::kStride]) {
  using C = Config<T, kDim>;
  const int lane = lane_index();
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < C::kColTiles; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.f;
  }
#pragma unroll
  for (int s = 0; s < C::kSteps; ++s) {
    if constexpr (C::kIsFloat) {
      const float* low = own.rows[lane / 4] + 8 * s + lane % 4;
      const float* high = low + 8 * C::kStride;
      const float a[4] = {low[0], high[0], low[4], high[4]};
#pragma unroll
      for (int n = 0; n < C::kColTiles; ++n) {
        const T* row = tile[8 * n + lane / 4] + 8 * s + lane % 4;
        const float b[2] = {row[0], row[4]};
        mma_m16n8k8_3xtf32(acc[0][n], a, b);
      }
    } else {
#pragma unroll
      for (int n = 0; n < C::kColTiles; n += 2) {
        uint32_t pair[4];
        ldmatrix_x4(pair, &tile[8 * n + lane % 8 + 8 * (lane / 16)][16 * s + 8 * (lane / 8 % 2)]);
        const uint32_t b[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
          mma_m16n8k16<T>(acc[m][n], own.a[m][s], b[0]);
          mma_m16n8k16<T>(acc[m][n + 1], own.a[m][s], b[1]);
        }
      }
    }
  }
}

// sum * 2^peak is a sum of exponentials, 2^-inf of which is 0 for an empty one. NaN shows in the sum.
struct ExpSum {
  float peak = -INFINITY, sum = 0.f;

  __device__ static float safe(float peak) { return peak == -INFINITY ? 0.f : peak; }  // -inf - -inf would be NaN
  __device__ void merge(float other_peak, float other_sum) {
    const float highest = fmaxf(peak, other_peak), base = safe(highest);
    sum = sum * fast_exp2(peak - base) + other_sum * fast_exp2(other_peak - base);
    peak = highest;
  }
  __device__ float lse() const { return sum == 0.f ? -INFINITY : kLn2 * peak + logf(sum); }
};

template <int kWidth>
__device__ inline void warp_merge(ExpSum& x) {  // valid in every lane
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    const float peak = __shfl_xor_sync(kFullMask, x.peak, offset), sum = __shfl_xor_sync(kFullMask, x.sum, offset);
    x.merge(peak, sum);
  }
}

// How many keys the rows [first, last] of a group see: at least, at most.
struct Seen {
  int least, most;
};
__device__ inline Seen seen_by(const AttnReceivedArgs& a, int first, int last) {
  const int q_len = static_cast<int>(a.q_len);
  const bool one_head = first / q_len == last / q_len;
  return {static_cast<int>(a.num_visible(one_head ? first % q_len : 0)),
          static_cast<int>(a.num_visible(one_head ? last % q_len : q_len - 1))};
}

// Pass 1. A block takes warps * kRowsPerWarp rows of a group and one split of the keys.
template <typename T, int kDim>
__global__ void __launch_bounds__(Config<T, kDim>::kMaxThreads, 2)
    attn_lse_kernel(const AttnReceivedArgs args, int row_blocks, int num_splits, int split_keys, bool aligned) {
  using C = Config<T, kDim>;
  using S = Storage<T, kDim>;
  TOKRED_SHARED(S, shared);
  const int num_rows = static_cast<int>(args.rows()), head_dim = static_cast<int>(args.head_dim);
  // Causal: the last rows see the most keys and start first.
  const int row_block = row_blocks - 1 - static_cast<int>(blockIdx.x % static_cast<unsigned>(row_blocks));
  const int64_t rest = blockIdx.x / static_cast<unsigned>(row_blocks), head = rest / num_splits;
  const int split = static_cast<int>(rest % num_splits);
  const int64_t batch_idx = head / args.num_kv_heads, kv_head_idx = head % args.num_kv_heads;

  const int block_rows = num_threads_in_block() / kWarpSize * C::kRowsPerWarp;
  const int block_row = row_block * block_rows, row0 = block_row + warp_index() * C::kRowsPerWarp;
  const int last_of_block = min(block_row + block_rows, num_rows) - 1;
  const int begin = split * split_keys;
  const int end = begin + min(split_keys, seen_by(args, block_row, last_of_block).most - begin);
  const int num_tiles = end > begin ? ceil_div(end - begin, C::kTile) : 0;
  Seen seen{0, 0};  // by the warp's rows; rows past the last are not written, so they need no mask
  if (row0 < num_rows) seen = seen_by(args, row0, min(row0 + C::kRowsPerWarp, num_rows) - 1);
  seen.most = min(seen.most, end);

  const Rows<T> keys = key_rows<T>(args, batch_idx, kv_head_idx);
  const auto issue = [&](int i) {
    block_load_tile<T, kDim>(shared.tile[i % C::kStages], keys, begin + i * C::kTile, head_dim, aligned);
  };
#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) {
    if (i < num_tiles) issue(i);
    cp_async_commit();
  }
  OwnRows<T, kDim> own;
  const int g = lane_index() / 4, t = lane_index() % 4;
  own.load(
      shared,
      [&](int r) -> const T* {
        if (row0 + r >= num_rows) return nullptr;
        const int head_in_group = (row0 + r) / static_cast<int>(args.q_len);
        const Rows<T> q = query_rows<T>(args, batch_idx, kv_head_idx * args.group() + head_in_group);
        return q.data + (row0 + r) % static_cast<int>(args.q_len) * q.stride;
      },
      head_dim, aligned);

  const float scale = args.scale * kLog2e;
  ExpSum rows[2 * C::kRowTiles];
  for (int i = 0; i < num_tiles; ++i) {
    cp_async_wait<C::kStages - 2>();
    __syncthreads();  // tile i is there, and tile i - 1 is read by all
    if (i + C::kStages - 1 < num_tiles) issue(i + C::kStages - 1);
    cp_async_commit();
    for (int c = 0; c < C::kTile; c += C::kChunk) {
      const int key0 = begin + i * C::kTile + c;
      if (key0 >= seen.most) break;
      float acc[C::kRowTiles][C::kColTiles][4];
      warp_multiply<T, kDim>(acc, own, shared.tile[i % C::kStages] + c);
      if (key0 + C::kChunk > seen.least) {
#pragma unroll
        for (int r = 0; r < 2 * C::kRowTiles; ++r) {
          const int visible = static_cast<int>(args.num_visible((row0 + 8 * r + g) % static_cast<int>(args.q_len)));
#pragma unroll
          for (int i = 0; i < 2 * C::kColTiles; ++i) {
            float& x = acc[r / 2][i / 2][2 * (r % 2) + i % 2];
            x = key0 + 8 * (i / 2) + 2 * t + i % 2 < visible ? x : -INFINITY;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2 * C::kRowTiles; ++r) {
        float highest = -INFINITY;
#pragma unroll
        for (int i = 0; i < 2 * C::kColTiles; ++i) highest = fmaxf(highest, acc[r / 2][i / 2][2 * (r % 2) + i % 2]);
        const float peak = fmaxf(rows[r].peak, highest * scale), base = ExpSum::safe(peak);
        float sum = rows[r].sum * fast_exp2(rows[r].peak - base);
#pragma unroll
        for (int i = 0; i < 2 * C::kColTiles; ++i) {
          sum += fast_exp2(acc[r / 2][i / 2][2 * (r % 2) + i % 2] * scale - base);
        }
        rows[r].peak = peak;
        rows[r].sum = sum;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2 * C::kRowTiles; ++r) {
    warp_merge<4>(rows[r]);
    const int row = row0 + 8 * r + g;
    if (t != 0 || row >= num_rows) continue;
    if (num_splits == 1) {
      args.lse[head * num_rows + row] = rows[r].lse();
    } else {
      float* out = args.partial + ((head * num_splits + split) * num_rows + row) * 2;
      out[0] = rows[r].peak;
      out[1] = rows[r].sum;
    }
  }
}

// The lse from the sums of all splits: a warp per row.
__global__ void combine_lse_kernel(const AttnReceivedArgs args, int num_splits) {
  const int64_t num_rows = args.rows();
  const int64_t i = int64_t{blockIdx.x} * (num_threads_in_block() / kWarpSize) + warp_index();
  if (i >= args.batch_size * args.num_kv_heads * num_rows) return;  // the whole warp
  const int64_t head = i / num_rows, row = i % num_rows;
  ExpSum total;
  for (int split = lane_index(); split < num_splits; split += kWarpSize) {
    const float* part = args.partial + ((head * num_splits + split) * num_rows + row) * 2;
    total.merge(part[0], part[1]);
  }
  warp_merge<kWarpSize>(total);
  if (lane_index() == 0) args.lse[i] = total.lse();
}

__global__ void copy_lse_kernel(const AttnReceivedArgs args) {
  const int64_t i = int64_t{blockIdx.x} * num_threads_in_block() + thread_rank();
  if (i >= args.batch_size * args.num_q_heads * args.q_len) return;
  const int64_t head = i / args.q_len, batch_idx = head / args.num_q_heads, head_idx = head % args.num_q_heads;
  args.lse[i] = args.lse_in[batch_idx * args.stride_lse_in.batch + head_idx * args.stride_lse_in.head + i % args.q_len];
}

// NaN if either is.
__device__ inline float max_nan(float a, float b) { return b > a || b != b ? b : a; }

// Pass 2. A block takes warps * kRowsPerWarp keys and all queries of the group that see one of them.
template <typename T, int kDim>
__global__ void __launch_bounds__(Config<T, kDim>::kMaxThreads, 2)
    attn_received_kernel(const AttnReceivedArgs args, int key_blocks, bool aligned) {
  using C = Config<T, kDim>;
  using S = Storage<T, kDim>;
  TOKRED_SHARED(S, shared);
  const int q_len = static_cast<int>(args.q_len), kv_len = static_cast<int>(args.kv_len);
  const int head_dim = static_cast<int>(args.head_dim), q_start = static_cast<int>(args.q_start);
  const int key_block = static_cast<int>(blockIdx.x % static_cast<unsigned>(key_blocks));
  const int64_t head = blockIdx.x / static_cast<unsigned>(key_blocks);
  const int64_t batch_idx = head / args.num_kv_heads, kv_head_idx = head % args.num_kv_heads;
  const int64_t first_head = kv_head_idx * args.group();

  const int block_key = key_block * (num_threads_in_block() / kWarpSize) * C::kRowsPerWarp;
  const int key0 = block_key + warp_index() * C::kRowsPerWarp;
  // The first query that sees the block's first key.
  const int64_t first_seeing = args.causal ? int64_t{block_key} - q_start : 0;
  const int q_begin = static_cast<int>(first_seeing < 0 ? 0 : first_seeing < q_len ? first_seeing : q_len);
  const int tiles_per_head = ceil_div(q_len - q_begin, C::kTile);
  const int num_tiles = tiles_per_head * static_cast<int>(args.group());

  const auto issue = [&](int i) {
    const int stage = i % C::kStages, q0 = q_begin + i % tiles_per_head * C::kTile;
    const int64_t head_idx = first_head + i / tiles_per_head;
    block_load_tile<T, kDim>(shared.tile[stage], query_rows<T>(args, batch_idx, head_idx), q0, head_dim, aligned);
    const int r = thread_rank();  // the block has at least kTile threads
    if (r >= C::kTile) return;
    const bool valid = q0 + r < q_len;
    const int64_t query = valid ? q0 + r : 0;
    cp_async_4(&shared.lse[stage][r], args.lse + (batch_idx * args.num_q_heads + head_idx) * q_len + query, valid);
    if (!args.q_weight) return;
    const int64_t offset = batch_idx * args.stride_weight.batch + head_idx * args.stride_weight.head;
    cp_async_4(&shared.weight[stage][r], args.q_weight + offset + query, valid);
  };
#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) {
    if (i < num_tiles) issue(i);
    cp_async_commit();
  }
  OwnRows<T, kDim> own;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const Rows<T> keys = key_rows<T>(args, batch_idx, kv_head_idx);
  own.load(shared, [&](int r) { return key0 + r < kv_len ? keys.data + (key0 + r) * keys.stride : nullptr; }, head_dim, aligned);

  const float scale = args.scale * kLog2e;
  float total[2 * C::kRowTiles] = {};
  const auto write = [&](int head_in_group) {  // the head's sums, and start the next
#pragma unroll
    for (int r = 0; r < 2 * C::kRowTiles; ++r) {
      float x = total[r];
      x = args.max_reduce ? warp_reduce<4>(x, [](float a, float b) { return max_nan(a, b); }) : warp_sum<4>(x);
      const int key = key0 + 8 * r + g;
      if (t == 0 && key < kv_len) {
        args.received[(batch_idx * args.num_q_heads + first_head + head_in_group) * kv_len + key] = x;
      }
      total[r] = 0.f;
    }
  };
  for (int i = 0; i < num_tiles; ++i) {
    cp_async_wait<C::kStages - 2>();
    __syncthreads();  // tile i is there, and tile i - 1 is read by all
    if (i + C::kStages - 1 < num_tiles) issue(i + C::kStages - 1);
    cp_async_commit();
    const int stage = i % C::kStages, tile_q = q_begin + i % tiles_per_head * C::kTile;
    for (int c = 0; c < C::kTile && key0 < kv_len; c += C::kChunk) {
      const int q0 = tile_q + c, q_end = min(q0 + C::kChunk, q_len);
      if (q0 >= q_len) break;
      if (args.causal && int64_t{q_start} + q_end - 1 < key0) continue;
      float acc[C::kRowTiles][C::kColTiles][4];
      warp_multiply<T, kDim>(acc, own, shared.tile[stage] + c);
      const bool masked = q0 + C::kChunk > q_len || (args.causal && int64_t{q_start} + q0 < key0 + C::kRowsPerWarp - 1);
#pragma unroll
      for (int n = 0; n < C::kColTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + 2 * t + e;
          const float lse = shared.lse[stage][c + column];
          const float weight = args.q_weight ? shared.weight[stage][c + column] : 1.f;
          const int query = q0 + column;
          // Keys before this one are seen; none by a query that is not there or whose lse is -inf.
          int visible = args.causal ? static_cast<int>(args.num_visible(query)) : kv_len;
          if (query >= q_len || lse == -INFINITY) visible = 0;
          const bool check = masked || lse == -INFINITY;
#pragma unroll
          for (int r = 0; r < 2 * C::kRowTiles; ++r) {
            float p = weight * fast_exp2(acc[r / 2][n][2 * (r % 2) + e] * scale - lse * kLog2e);
            if (check && key0 + 8 * r + g >= visible) p = 0.f;
            total[r] = args.max_reduce ? max_nan(total[r], p) : total[r] + p;
          }
        }
      }
    }
    if (i % tiles_per_head == tiles_per_head - 1) write(i / tiles_per_head);
  }
  if (num_tiles == 0) {
    for (int h = 0; h < static_cast<int>(args.group()); ++h) write(h);
  }
}

template <typename T>
bool is_aligned(const void* data, const AttnReceivedStrides& stride, int64_t batch_size, int64_t heads, int64_t tokens) {
  const int64_t strides = (batch_size > 1 ? stride.batch : 0) | (heads > 1 ? stride.head : 0) | (tokens > 1 ? stride.token : 0);
  return (reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(strides) * sizeof(T)) % 16 == 0;
}

template <typename T, int kDim>
int launch_passes(const AttnReceivedArgs& a, CUstream_st* stream) {
  using C = Config<T, kDim>;
  const auto policy = choose_attn_received_policy(a.rows(), a.kv_len, a.head_dim, a.dtype);
  if (policy.rows_per_warp != C::kRowsPerWarp) return cudaErrorInvalidValue;
  const bool aligned = a.head_dim * sizeof(T) % 16 == 0 &&
                       is_aligned<T>(a.q, a.stride_q, a.batch_size, a.num_q_heads, a.q_len) &&
                       is_aligned<T>(a.k, a.stride_k, a.batch_size, a.num_kv_heads, a.kv_len);
  const int64_t heads = a.batch_size * a.num_kv_heads, rows = heads * a.rows();
  const auto blocks = [](int64_t n) { return dim3(static_cast<unsigned>(n)); };
  int error = cudaSuccess;
  if (a.lse_in) {
    error = launch(copy_lse_kernel, blocks(ceil_div<int64_t>(rows, 256)), 256, 0, stream, a);
  } else {
    const int64_t row_blocks = ceil_div<int64_t>(a.rows(), policy.warps_lse * C::kRowsPerWarp);
    error = launch(attn_lse_kernel<T, kDim>, blocks(heads * row_blocks * policy.num_splits), policy.warps_lse * 32,
                   sizeof(Storage<T, kDim>), stream, a, static_cast<int>(row_blocks), static_cast<int>(policy.num_splits),
                   static_cast<int>(policy.split_keys), aligned);
    if (error == cudaSuccess && policy.num_splits > 1) {
      error = launch(combine_lse_kernel, blocks(ceil_div<int64_t>(rows, 8)), 256, 0, stream, a,
                     static_cast<int>(policy.num_splits));
    }
  }
  const int64_t key_blocks = ceil_div<int64_t>(a.kv_len, policy.warps_received * C::kRowsPerWarp);
  if (error != cudaSuccess || a.kv_len == 0) return error;
  return launch(attn_received_kernel<T, kDim>, blocks(heads * key_blocks), policy.warps_received * 32,
                sizeof(Storage<T, kDim>), stream, a, static_cast<int>(key_blocks), aligned);
}

int smallest_above(int x, std::initializer_list<int> sizes) {
  for (const int size : sizes) {
    if (x <= size) return size;
  }
  return 0;
}

}  // namespace

int attn_received_cuda(const AttnReceivedArgs& args, CUstream_st* stream) {
  int error = cudaErrorInvalidValue;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    // head_dim is padded with zeros: to the sizes of real models for 16-bit types, to a power of two for float32.
    const auto run = [&](auto padded) { error = launch_passes<T, decltype(padded)::value>(args, stream); };
    const int head_dim = static_cast<int>(args.head_dim);
    if constexpr (sizeof(T) == 4) {
      (void)dispatch_int<64, 128, 256>(smallest_above(head_dim, {64, 128, 256}), run);
    } else {
      (void)dispatch_int<48, 64, 80, 96, 128, 160, 192, 256>(
          smallest_above(head_dim, {48, 64, 80, 96, 128, 160, 192, 256}), run);
    }
  });
  return error;
}

}  // namespace tokred
