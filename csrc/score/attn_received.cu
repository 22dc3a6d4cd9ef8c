// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: 2 * head_dim flops per logit and pass (two passes, one when the lse is given), one exponential per logit and
// pass, which binds at head_dim 64; K and Q from memory once per pass.
//
// Both passes are one product with exchanged roles. A warp holds its own rows (A fragments, whole depth) in registers;
// all warps of the block share a stream of tiles in shared memory. What is reduced runs along the stream, so it stays
// in the thread: pass 1 owns queries and streams keys (running maximum and sum), pass 2 owns keys and streams queries
// (column sums, head after head). Nothing meets in memory: no atomics, and the order of additions is fixed. The queries
// of a group of heads are rows side by side, so K is read once for all of them. Pass 1 cuts the keys into splits of
// fixed length.
#include "score/attn_received_tiles.cuh"

#include <initializer_list>

namespace tokred {
namespace {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

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
__global__ void __launch_bounds__(AttnConfig<T, kDim>::kMaxThreads, 2)
    attn_lse_kernel(const AttnReceivedArgs args, int row_blocks, int num_splits, int split_keys, bool aligned) {
  using C = AttnConfig<T, kDim>;
  using S = AttnStorage<T, kDim>;
  TOKRED_SHARED(S, shared);
  const int num_rows = static_cast<int>(args.rows()), head_dim = static_cast<int>(args.head_dim);
  // Causal: the last rows see the most keys and start first.
  const int row_block = row_blocks - 1 - static_cast<int>(blockIdx.x % static_cast<unsigned>(row_blocks));
  const int rest = static_cast<int>(blockIdx.x / static_cast<unsigned>(row_blocks));
  const int split = rest % num_splits, head = rest / num_splits;
  const int num_kv_heads = static_cast<int>(args.num_kv_heads);
  const int batch_idx = head / num_kv_heads, kv_head_idx = head % num_kv_heads;

  const int block_rows = num_threads_in_block() / kWarpSize * C::kRowsPerWarp;
  const int block_row = row_block * block_rows, row0 = block_row + warp_index() * C::kRowsPerWarp;
  const int last_of_block = min(block_row + block_rows, num_rows) - 1;
  const int begin = split * split_keys;
  const int end = begin + min(split_keys, seen_by(args, block_row, last_of_block).most - begin);
  const int num_tiles = ceil_div(max(end - begin, 0), C::kTile);
  Seen seen{0, 0};  // by the warp's rows; rows past the last are not written, so they need no mask
  if (row0 < num_rows) seen = seen_by(args, row0, min(row0 + C::kRowsPerWarp, num_rows) - 1);
  seen.most = min(seen.most, end);

  const auto issue = [&](int i) {
    const Rows<T> keys = key_rows<T>(args, batch_idx, kv_head_idx);
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
      args.lse[int64_t{head} * num_rows + row] = rows[r].lse();
    } else {
      float* out = args.partial + ((int64_t{head} * num_splits + split) * num_rows + row) * 2;
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

// Products q k become the weights that the chunk's queries, columns of acc, give to the warp's keys. 0 from a query
// whose lse is -inf, and to keys from visible(column) on where masked says that there may be some. One instruction or
// two per weight next to its exponential: all that is rare or the same in the whole warp stays out of the loop.
template <int kRowTiles, int kColTiles, typename Visible>
__device__ inline void thread_weigh(float (&acc)[kRowTiles][kColTiles][4], const float* lse, const float* weight,
                                    bool weighted, float scale, bool masked, int key0, const Visible& visible) {
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
    const int column = 8 * (i / 2) + 2 * t + i % 2, end = lse[column] == -INFINITY ? 0 : visible(column);
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      if (key0 + 8 * r + g >= end) acc[r / 2][i / 2][2 * (r % 2) + i % 2] = 0.f;
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

// Pass 2. A block takes warps * kRowsPerWarp keys and all queries of the group that see one of them.
template <typename T, int kDim>
__global__ void __launch_bounds__(AttnConfig<T, kDim>::kMaxThreads, 2)
    attn_received_kernel(const AttnReceivedArgs args, int key_blocks, bool aligned) {
  using C = AttnConfig<T, kDim>;
  using S = AttnStorage<T, kDim>;
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
  const int q_begin = static_cast<int>(min(max(first_seeing, int64_t{0}), int64_t{q_len}));
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
  own.load(
      shared, [&](int r) { return key0 + r < kv_len ? keys.data + (key0 + r) * keys.stride : nullptr; }, head_dim,
      aligned);

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
      // Keys before this one are seen by query c + column of the tile; none where there is no query.
      const auto visible = [&](int column) {
        const int query = q0 + column;
        return query >= q_len ? 0 : args.causal ? static_cast<int>(args.num_visible(query)) : kv_len;
      };
      thread_weigh<C::kRowTiles>(acc, &shared.lse[stage][c], &shared.weight[stage][c], args.q_weight != nullptr, scale,
                                 masked, key0, visible);
      thread_add<C::kRowTiles>(acc, args.max_reduce, total);
    }
    if (i % tiles_per_head == tiles_per_head - 1) write(i / tiles_per_head);
  }
  if (num_tiles == 0) {
    for (int h = 0; h < static_cast<int>(args.group()); ++h) write(h);
  }
}

template <typename T>
bool is_aligned(const void* data, const AttnReceivedStrides& stride, int64_t batch_size, int64_t heads,
                int64_t tokens) {
  const int64_t strides =
      (batch_size > 1 ? stride.batch : 0) | (heads > 1 ? stride.head : 0) | (tokens > 1 ? stride.token : 0);
  return (reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(strides) * sizeof(T)) % 16 == 0;
}

template <typename T, int kDim>
int launch_passes(const AttnReceivedArgs& a, CUstream_st* stream) {
  using C = AttnConfig<T, kDim>;
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
                   sizeof(AttnStorage<T, kDim>), stream, a, static_cast<int>(row_blocks),
                   static_cast<int>(policy.num_splits), static_cast<int>(policy.split_keys), aligned);
    if (error == cudaSuccess && policy.num_splits > 1) {
      error = launch(combine_lse_kernel, blocks(ceil_div<int64_t>(rows, 8)), 256, 0, stream, a,
                     static_cast<int>(policy.num_splits));
    }
  }
  const int64_t key_blocks = ceil_div<int64_t>(a.kv_len, policy.warps_received * C::kRowsPerWarp);
  if (error != cudaSuccess) return error;
  return launch(attn_received_kernel<T, kDim>, blocks(heads * key_blocks), policy.warps_received * 32,
                sizeof(AttnStorage<T, kDim>), stream, a, static_cast<int>(key_blocks), aligned);
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
    // head_dim is padded with zeros: to the sizes of real models for 16-bit types (none below 64, where the exponential
    // binds anyway), to a power of two for float32.
    const auto run = [&](auto padded) { error = launch_passes<T, decltype(padded)::value>(args, stream); };
    const int head_dim = static_cast<int>(args.head_dim);
    if constexpr (sizeof(T) == 4) {
      (void)dispatch_int<64, 128, 256>(smallest_above(head_dim, {64, 128, 256}), run);
    } else {
      (void)dispatch_int<64, 80, 96, 128, 160, 192, 256>(smallest_above(head_dim, {64, 80, 96, 128, 160, 192, 256}),
                                                         run);
    }
  });
  return error;
}

}  // namespace tokred
