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
#include "score/attn_received_weights.cuh"

#include <initializer_list>

namespace tokred {
namespace {

// Of the rows [first, last] of a group; exact within one head.
__device__ inline Seen seen_by(const AttnReceivedArgs& a, int first, int last) {
  const int q_len = static_cast<int>(a.q_len);
  const bool one_head = first / q_len == last / q_len;
  const KeySpan low = a.visible(one_head ? first % q_len : 0), high = a.visible(one_head ? last % q_len : q_len - 1);
  return {{low.begin, high.end}, {high.begin, low.end}};
}

// Pass 1. A block takes warps * kRowsPerWarp rows of a group and one split of the keys.
template <typename T, int kDim>
__global__ void __launch_bounds__(AttnConfig<T, kDim>::kMaxThreads, AttnConfig<T, kDim>::kBlocksPerSm)
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
  const KeySpan of_block = seen_by(args, block_row, last_of_block).any;
  // In whole chunks from the first key on, so that a row's sums do not depend on the rows beside it.
  const int begin = max(split * split_keys, of_block.begin / C::kChunk * C::kChunk);
  const int end = split * split_keys + min(split_keys, of_block.end - split * split_keys);
  const int num_tiles = ceil_div(max(end - begin, 0), C::kTile);
  if (lane_index() == 0) {  // rows past the last are not written, so they need no mask
    Seen seen{};
    if (row0 < num_rows) seen = seen_by(args, row0, min(row0 + C::kRowsPerWarp, num_rows) - 1);
    seen.any.end = min(seen.any.end, end);
    shared.keys.warp_sees[warp_index()] = seen;
  }
  if (thread_rank() == 0) shared.keys.rows = key_rows<T>(args, batch_idx, kv_head_idx);
  for (int r = lane_index(); r < C::kRowsPerWarp; r += kWarpSize) {
    shared.keys.row_sees[warp_index() * C::kRowsPerWarp + r] = args.visible((row0 + r) % static_cast<int>(args.q_len));
  }
  __syncthreads();

  const auto issue = [&](int i) {
    const Rows<T> keys = shared.keys.rows;
    const int first = begin + i * C::kTile;
    block_load_tile<T, kDim>(shared.tile[i % C::kStages], keys, first, head_dim, aligned);
    const int r = thread_rank();  // the block has at least kTile threads
    if (!args.key_bias || r >= C::kTile) return;
    const bool valid = first + r < keys.count;
    const float* bias = args.key_bias + batch_idx * args.bias_batch + kv_head_idx * args.bias_head;
    cp_async_4(&shared.keys.bias[i % C::kStages][r], bias + (valid ? first + r : 0), valid);
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

  ExpSum rows[2 * C::kRowTiles];
  for (int i = 0; i < num_tiles; ++i) {
    cp_async_wait<C::kStages - 2>();
    __syncthreads();  // tile i is there, and tile i - 1 is read by all
    if (i + C::kStages - 1 < num_tiles) issue(i + C::kStages - 1);
    cp_async_commit();
    for (int c = 0; c < C::kTile; c += C::kChunk) {
      const int key0 = begin + i * C::kTile + c;
      const KeySpan any = shared.keys.warp_sees[warp_index()].any;
      if (key0 >= any.end) break;
      if (key0 + C::kChunk <= any.begin) continue;
      float acc[C::kRowTiles][C::kColTiles][4];
      warp_multiply<T, kDim>(acc, own, shared.tile[i % C::kStages] + c);
      if (args.adjusted()) {
        const float* bias = args.key_bias ? shared.keys.bias[i % C::kStages] + c + 2 * t : nullptr;
        thread_adjust(acc, args.scale, args.softcap, bias, [](int, int i) { return 8 * (i / 2) + i % 2; });
      }
      const KeySpan all = shared.keys.warp_sees[warp_index()].all;
      if (key0 < all.begin || key0 + C::kChunk > all.end) {
#pragma unroll
        for (int r = 0; r < 2 * C::kRowTiles; ++r) {
          const KeySpan span = shared.keys.row_sees[warp_index() * C::kRowsPerWarp + 8 * r + g];
#pragma unroll
          for (int i = 0; i < 2 * C::kColTiles; ++i) {
            float& x = acc[r / 2][i / 2][2 * (r % 2) + i % 2];
            x = span.has(key0 + 8 * (i / 2) + 2 * t + i % 2) ? x : -INFINITY;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2 * C::kRowTiles; ++r) {
        float highest = -INFINITY;
#pragma unroll
        for (int i = 0; i < 2 * C::kColTiles; ++i) highest = fmaxf(highest, acc[r / 2][i / 2][2 * (r % 2) + i % 2]);
        const float peak = fmaxf(rows[r].peak, highest * args.exponent_scale), base = ExpSum::safe(peak);
        float sum = rows[r].sum * fast_exp2(rows[r].peak - base);
#pragma unroll
        for (int i = 0; i < 2 * C::kColTiles; ++i) {
          sum += fast_exp2(acc[r / 2][i / 2][2 * (r % 2) + i % 2] * args.exponent_scale - base);
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
      rows[r].add_sink(args, int64_t{head} * num_rows + row);
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
  total.add_sink(args, i);
  if (lane_index() == 0) args.lse[i] = total.lse();
}

__global__ void copy_lse_kernel(const AttnReceivedArgs args) {
  const int64_t i = int64_t{blockIdx.x} * num_threads_in_block() + thread_rank();
  if (i >= args.batch_size * args.num_q_heads * args.q_len) return;
  const int64_t head = i / args.q_len, batch_idx = head / args.num_q_heads, head_idx = head % args.num_q_heads;
  args.lse[i] = args.lse_in[batch_idx * args.stride_lse_in.batch + head_idx * args.stride_lse_in.head + i % args.q_len];
}

// Pass 2. A block takes warps * kRowsPerWarp keys and all queries of the group that see one of them.
template <typename T, int kDim>
__global__ void __launch_bounds__(AttnConfig<T, kDim>::kMaxThreads, AttnConfig<T, kDim>::kBlocksPerSm)
    attn_received_kernel(const AttnReceivedArgs args, int key_blocks, bool aligned) {
  using C = AttnConfig<T, kDim>;
  using S = AttnStorage<T, kDim>;
  TOKRED_SHARED(S, shared);
  const int q_len = static_cast<int>(args.q_len), kv_len = static_cast<int>(args.kv_len);
  const int head_dim = static_cast<int>(args.head_dim);
  const int key_block = static_cast<int>(blockIdx.x % static_cast<unsigned>(key_blocks));
  const int head = static_cast<int>(blockIdx.x / static_cast<unsigned>(key_blocks));
  const int num_kv_heads = static_cast<int>(args.num_kv_heads), group = static_cast<int>(args.group());
  const int batch_idx = head / num_kv_heads, kv_head_idx = head % num_kv_heads, first_head = kv_head_idx * group;

  const int block_keys = num_threads_in_block() / kWarpSize * C::kRowsPerWarp;
  const int block_key = key_block * block_keys, key0 = block_key + warp_index() * C::kRowsPerWarp;
  // The queries that see one of the block's keys. In eights from the first query on, as fragments have them, so that a
  // key's sums do not depend on the keys beside it.
  const int q_begin = min(max(block_key - args.band.end + 1, 0), q_len) / 8 * 8;
  const int q_end = min(max(min(block_key + block_keys, kv_len) - args.band.first, 0), q_len);
  const int tiles_per_head = ceil_div(max(q_end - q_begin, 0), C::kTile);
  const int num_tiles = tiles_per_head * group;

  const auto issue = [&](int i) {
    const int stage = i % C::kStages, q0 = q_begin + i % tiles_per_head * C::kTile;
    const int head_idx = first_head + i / tiles_per_head;
    block_load_tile<T, kDim>(shared.tile[stage], query_rows<T>(args, batch_idx, head_idx), q0, head_dim, aligned);
    const int r = thread_rank();  // the block has at least kTile threads
    if (r >= C::kTile) return;
    const bool valid = q0 + r < q_end;
    const int64_t query = valid ? q0 + r : 0;
    shared.queries.sees[stage][r] = valid ? args.visible(q0 + r) : KeySpan{0, 0};
    cp_async_4(&shared.queries.lse[stage][r], args.lse + (batch_idx * args.num_q_heads + head_idx) * q_len + query,
               valid);
    if (!args.q_weight) return;
    const int64_t offset = batch_idx * args.stride_weight.batch + head_idx * args.stride_weight.head;
    cp_async_4(&shared.queries.weight[stage][r], args.q_weight + offset + query, valid);
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

  if (args.key_bias && thread_rank() < block_keys) {  // the first barrier of the loop publishes them
    const int key = block_key + thread_rank();
    const float* bias = args.key_bias + batch_idx * args.bias_batch + kv_head_idx * args.bias_head;
    shared.queries.own_bias[thread_rank()] = key < kv_len ? bias[key] : 0.f;
  }
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
      const int q0 = tile_q + c, last_key = key0 + C::kRowsPerWarp - 1;
      if (q0 >= q_end) break;
      const int last_q = q0 + C::kChunk - 1;
      if (last_q + args.band.end <= key0 || q0 + args.band.first > last_key) continue;
      float acc[C::kRowTiles][C::kColTiles][4];
      warp_multiply<T, kDim>(acc, own, shared.tile[stage] + c);
      if (args.adjusted()) {
        const float* bias = args.key_bias ? shared.queries.own_bias + warp_index() * C::kRowsPerWarp + g : nullptr;
        thread_adjust(acc, args.scale, args.softcap, bias, [](int r, int) { return 8 * r; });
      }
      const bool masked = last_q >= q_end || q0 + args.band.end <= last_key || last_q + args.band.first > key0;
      thread_weigh<C::kRowTiles>(acc, &shared.queries.lse[stage][c], &shared.queries.weight[stage][c],
                                 args.q_weight != nullptr, args.exponent_scale, masked, key0,
                                 &shared.queries.sees[stage][c]);
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
