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

namespace tokred {
namespace {

// By the rows [first, last] of a group; exact within one head.
__device__ inline Seen seen_by(const AttnSequence& s, int first, int last) {
  const bool one_head = first / s.q_len == last / s.q_len;
  const KeySpan low = s.visible(one_head ? first % s.q_len : 0),
                high = s.visible(one_head ? last % s.q_len : s.q_len - 1);
  return {{low.begin, high.end}, {high.begin, low.end}};
}

// Peak and sum of one row's exponentials over one split.
__device__ inline float* partial_sums(const AttnReceivedArgs& a, const AttnSequence& s, int64_t kv_head, int split,
                                      int row, int num_rows) {
  const int64_t plane = s.batch * a.num_kv_heads + kv_head;
  return a.partial + 2 * (plane * a.partial_plane() + a.partial_begin(s) + int64_t{split} * num_rows + row);
}

// Pass 1. A block takes warps * kRowsPerWarp rows of a group and one split of the keys.
template <typename T, int kDim>
__global__ void __launch_bounds__(AttnConfig<T, kDim>::kMaxThreads, AttnConfig<T, kDim>::kBlocksPerSm)
    attn_lse_kernel(const AttnReceivedArgs args, const AttnBlocks blocks, bool aligned) {
  using C = AttnConfig<T, kDim>;
  using S = AttnStorage<T, kDim>;
  TOKRED_SHARED(S, shared);
  const AttnPlace place = locate(args, blocks);
  const AttnSequence s = place.sequence;
  const int kv_head = place.kv_head, head_dim = static_cast<int>(args.head_dim);
  const int num_rows = static_cast<int>(args.group()) * s.q_len;
  const AttnSplits splits = args.splits(num_rows, s.kv_len);
  const int block_rows = num_threads_in_block() / kWarpSize * C::kRowsPerWarp;
  const int row_blocks = ceil_div(num_rows, block_rows);
  if (place.index < 0 || place.index >= row_blocks * splits.num) return;  // the whole block
  // Causal: the last rows see the most keys and start first.
  const int block_row = (row_blocks - 1 - place.index % row_blocks) * block_rows, split = place.index / row_blocks;
  const int row0 = block_row + warp_index() * C::kRowsPerWarp;
  const KeySpan of_block = seen_by(s, block_row, min(block_row + block_rows, num_rows) - 1).any;
  // In whole chunks from the first key on, so that a row's sums do not depend on the rows beside it.
  const int begin = max(split * splits.keys, of_block.begin / C::kChunk * C::kChunk);
  const int end = split * splits.keys + min(splits.keys, of_block.end - split * splits.keys);
  const int num_tiles = ceil_div(max(end - begin, 0), C::kTile);
  if (lane_index() == 0) {  // rows past the last are not written, so they need no mask
    Seen seen{};
    if (row0 < num_rows) seen = seen_by(s, row0, min(row0 + C::kRowsPerWarp, num_rows) - 1);
    seen.any.end = min(seen.any.end, end);
    shared.keys.warp_sees[warp_index()] = seen;
  }
  for (int r = lane_index(); r < C::kRowsPerWarp; r += kWarpSize) {
    shared.keys.row_sees[warp_index() * C::kRowsPerWarp + r] = s.visible((row0 + r) % s.q_len);
  }
  if (thread_rank() == 0) {
    shared.place = place;
    const T* keys = keys_of_head<T>(args, s, kv_head);
    shared.keys.rows = {keys + (args.page_table ? 0 : s.k_begin * args.stride_k.token), args.stride_k.token, s.kv_len};
  }
  // Where the rows of a tile are, one tile ahead of their copies.
  const auto look_up = [&](int i) {
    const int r = thread_rank(), key = begin + i * C::kTile + r;  // the block has at least kTile threads
    if (!args.page_table || r >= C::kTile) return;
    const AttnSequence& of = shared.place.sequence;
    shared.keys.offset[i % C::kStages][r] = key < of.kv_len ? args.key_row(of, key) : -1;
  };
  const auto issue = [&](int i) {
    const int stage = i % C::kStages, first = begin + i * C::kTile, r = thread_rank();
    const int64_t* offset = args.page_table ? shared.keys.offset[stage] : nullptr;
    block_load_tile<T, kDim>(shared.tile[stage], shared.keys.rows, first, offset, head_dim, aligned);
    if (r >= C::kTile) return;
    if (offset) shared.keys.absent[stage][r] = offset[r] < 0;
    if (!args.key_bias) return;
    const AttnSequence& of = shared.place.sequence;
    const bool valid = first + r < of.kv_len;
    const float* bias = args.key_bias + of.batch * args.bias_batch + shared.place.kv_head * args.bias_head + of.k_begin;
    cp_async_4(&shared.keys.bias[stage][r], bias + (valid ? first + r : 0), valid);
  };
  __syncthreads();  // the sequence is there
  if (args.page_table) {
    look_up(0);
    __syncthreads();
  }
  if (num_tiles > 0) issue(0);
  cp_async_commit();
  look_up(1);
  OwnRows<T, kDim> own;
  const int g = lane_index() / 4, t = lane_index() % 4;
  own.load(
      shared,
      [&](int r) -> const T* {
        if (row0 + r >= num_rows) return nullptr;
        const Rows<T> q = query_rows<T>(args, s, kv_head * args.group() + (row0 + r) / s.q_len);
        return q.data + (row0 + r) % s.q_len * q.stride;
      },
      head_dim, aligned);

  ExpSum rows[2 * C::kRowTiles];
  for (int i = 0; i < num_tiles; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // tile i is there, and tile i - 1 is read by all
    if (i + 1 < num_tiles) issue(i + 1);
    cp_async_commit();
    look_up(i + 2);
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
      unsigned absent = 0;  // a bit for each key of the chunk
      if (args.page_table) {
        const bool mine = lane_index() < C::kChunk && shared.keys.absent[i % C::kStages][c + lane_index() % C::kChunk];
        absent = __ballot_sync(kFullMask, mine);
      }
      if (absent || key0 < all.begin || key0 + C::kChunk > all.end) {
#pragma unroll
        for (int r = 0; r < 2 * C::kRowTiles; ++r) {
          const KeySpan span = shared.keys.row_sees[warp_index() * C::kRowsPerWarp + 8 * r + g];
#pragma unroll
          for (int i = 0; i < 2 * C::kColTiles; ++i) {
            const int column = 8 * (i / 2) + 2 * t + i % 2;
            float& x = acc[r / 2][i / 2][2 * (r % 2) + i % 2];
            x = span.has(key0 + column) && !(absent >> column & 1) ? x : -INFINITY;
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
  const AttnSequence of = shared.place.sequence;
#pragma unroll
  for (int r = 0; r < 2 * C::kRowTiles; ++r) {
    warp_merge<4>(rows[r]);
    const int row = row0 + 8 * r + g;
    if (t != 0 || row >= num_rows) continue;
    if (splits.num == 1) {
      const int64_t head = shared.place.kv_head * args.group() + row / of.q_len;
      add_sink(rows[r], args, head);
      args.lse[(of.batch * args.num_q_heads + head) * args.q_len + of.q_begin + row % of.q_len] = rows[r].lse();
    } else {
      float* out = partial_sums(args, of, shared.place.kv_head, split, row, num_rows);
      out[0] = rows[r].peak;
      out[1] = rows[r].sum;
    }
  }
}

// The lse from the sums of all splits: a warp per row.
__global__ void combine_lse_kernel(const AttnReceivedArgs args) {
  const int64_t i = int64_t{blockIdx.x} * (num_threads_in_block() / kWarpSize) + warp_index();
  if (i >= args.batch_dim() * args.num_q_heads * args.q_len) return;  // the whole warp
  const int64_t head = i / args.q_len % args.num_q_heads, query = i % args.q_len;
  int64_t b = i / args.q_len / args.num_q_heads;
  if (args.packed())
    b = warp_search(static_cast<int>(args.batch_size), query, [&](int at) { return args.cu_seqlens[at]; });
  const AttnSequence s = args.sequence(b);
  const int num_rows = static_cast<int>(args.group()) * s.q_len;
  const int row = static_cast<int>(head % args.group() * s.q_len + query - s.q_begin);
  const AttnSplits splits = args.splits(num_rows, s.kv_len);
  if (splits.num == 1 || row < 0 || row >= num_rows) return;  // pass 1 has written it
  ExpSum total;
  for (int split = lane_index(); split < splits.num; split += kWarpSize) {
    const float* part = partial_sums(args, s, head / args.group(), split, row, num_rows);
    total.merge(part[0], part[1]);
  }
  warp_merge<kWarpSize>(total);
  add_sink(total, args, head);
  if (lane_index() == 0) args.lse[i] = total.lse();
}

__global__ void copy_lse_kernel(const AttnReceivedArgs args) {
  const int64_t i = int64_t{blockIdx.x} * num_threads_in_block() + thread_rank();
  if (i >= args.batch_dim() * args.num_q_heads * args.q_len) return;
  const int64_t head = i / args.q_len, batch_idx = head / args.num_q_heads, head_idx = head % args.num_q_heads;
  args.lse[i] = args.lse_in[batch_idx * args.stride_lse_in.batch + head_idx * args.stride_lse_in.head + i % args.q_len];
}

// Pass 2. A block takes warps * kRowsPerWarp keys and all queries of the group that see one of them.
template <typename T, int kDim>
__global__ void __launch_bounds__(AttnConfig<T, kDim>::kMaxThreads, AttnConfig<T, kDim>::kBlocksPerSm)
    attn_received_kernel(const AttnReceivedArgs args, const AttnBlocks blocks, bool aligned) {
  using C = AttnConfig<T, kDim>;
  using S = AttnStorage<T, kDim>;
  TOKRED_SHARED(S, shared);
  const AttnPlace place = locate(args, blocks);
  const AttnSequence s = place.sequence;
  const int head_dim = static_cast<int>(args.head_dim), group = static_cast<int>(args.group());
  const int kv_head = place.kv_head;
  // Paged: received has kv_len columns for each sequence, and those past its own keys are 0.
  const int num_columns = args.packed() ? s.kv_len : static_cast<int>(args.kv_len);
  const int block_keys = num_threads_in_block() / kWarpSize * C::kRowsPerWarp;
  const int block_key = place.index * block_keys, key0 = block_key + warp_index() * C::kRowsPerWarp;
  if (place.index < 0 || int64_t{place.index} * block_keys >= num_columns) return;  // the whole block
  // The queries that see one of the block's keys. In eights from the first query on, as fragments have them, so that a
  // key's sums do not depend on the keys beside it.
  const int q_begin = min(max(block_key - s.band.end + 1, 0), s.q_len) / 8 * 8;
  const int q_end =
      block_key >= s.kv_len ? 0 : min(max(min(block_key + block_keys, s.kv_len) - s.band.first, 0), s.q_len);
  const int tiles_per_head = ceil_div(max(q_end - q_begin, 0), C::kTile);
  const int num_tiles = tiles_per_head * group;
  if (thread_rank() == 0) shared.place = place;
  if (args.key_bias && thread_rank() < block_keys) {
    const int key = block_key + thread_rank();
    const float* bias = args.key_bias + s.batch * args.bias_batch + kv_head * args.bias_head + s.k_begin;
    shared.queries.own_bias[thread_rank()] = key < s.kv_len ? bias[key] : 0.f;
  }
  __syncthreads();

  const auto issue = [&](int i) {
    const int head = shared.place.kv_head * group + i / tiles_per_head;
    block_load_queries(shared, i % C::kStages, args, shared.place.sequence, head,
                       q_begin + i % tiles_per_head * C::kTile, q_end, aligned);
  };
  if (num_tiles > 0) issue(0);
  cp_async_commit();
  OwnRows<T, kDim> own;
  const int g = lane_index() / 4, t = lane_index() % 4;
  own.load(
      shared,
      [&](int r) -> const T* {
        const int64_t row = key0 + r < s.kv_len ? args.key_row(s, key0 + r) : -1;
        return row < 0 ? nullptr : keys_of_head<T>(args, s, kv_head) + row;
      },
      head_dim, aligned);

  float total[2 * C::kRowTiles] = {};
  const auto write = [&](int head_in_group) {  // the head's sums, and start the next
#pragma unroll
    for (int r = 0; r < 2 * C::kRowTiles; ++r) {
      float x = total[r];
      x = args.max_reduce ? warp_reduce<4>(x, [](float a, float b) { return max_nan(a, b); }) : warp_sum<4>(x);
      const int key = key0 + 8 * r + g;
      const AttnSequence of = shared.place.sequence;
      if (t == 0 && key < (args.packed() ? of.kv_len : args.kv_len)) {
        // What no query sees has gathered something if it shares its block with keys that are seen.
        if (key >= of.kv_len || (args.page_table && args.key_row(of, key) < 0)) x = 0.f;
        const int64_t head = of.batch * args.num_q_heads + shared.place.kv_head * group + head_in_group;
        args.received[head * args.kv_len + of.k_begin + key] = x;
      }
      total[r] = 0.f;
    }
  };
  for (int i = 0; i < num_tiles; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // tile i is there, and tile i - 1 is read by all
    if (i + 1 < num_tiles) issue(i + 1);
    cp_async_commit();
    const int stage = i % C::kStages, tile_q = q_begin + i % tiles_per_head * C::kTile;
    for (int c = 0; c < C::kTile && key0 < shared.place.sequence.kv_len; c += C::kChunk) {
      const int q0 = tile_q + c, last_key = key0 + C::kRowsPerWarp - 1;
      if (q0 >= q_end) break;
      const int last_q = q0 + C::kChunk - 1;
      const Band band = shared.place.sequence.band;
      if (last_q + band.end <= key0 || q0 + band.first > last_key) continue;
      float acc[C::kRowTiles][C::kColTiles][4];
      warp_multiply<T, kDim>(acc, own, shared.tile[stage] + c);
      if (args.adjusted()) {
        const float* bias = args.key_bias ? shared.queries.own_bias + warp_index() * C::kRowsPerWarp + g : nullptr;
        thread_adjust(acc, args.scale, args.softcap, bias, [](int r, int) { return 8 * r; });
      }
      const bool masked = last_q >= q_end || q0 + band.end <= last_key || last_q + band.first > key0;
      thread_weigh<C::kRowTiles>(acc, &shared.queries.lse[stage][c], &shared.queries.weight[stage][c],
                                 args.q_weight != nullptr, args.exponent_scale, masked, key0,
                                 &shared.queries.sees[stage][c]);
      thread_add<C::kRowTiles>(acc, args.max_reduce, total);
    }
    if (i % tiles_per_head == tiles_per_head - 1) write(i / tiles_per_head);
  }
  if (num_tiles == 0) {
    for (int h = 0; h < group; ++h) write(h);
  }
}

template <typename T, int kDim>
int launch_passes(const AttnReceivedArgs& a, CUstream_st* stream) {
  using C = AttnConfig<T, kDim>;
  const auto policy = choose_attn_received_policy(a);
  if (policy.rows_per_warp != C::kRowsPerWarp) return cudaErrorInvalidValue;
  const bool aligned = has_aligned_rows<T>(a);
  const int64_t heads = a.batch_dim() * a.num_kv_heads, rows = a.batch_dim() * a.num_q_heads * a.q_len;
  const auto grid = [](int64_t n) { return dim3(static_cast<unsigned>(n)); };
  const int shared_bytes = static_cast<int>(sizeof(AttnStorage<T, kDim>));
  int error = cudaSuccess;
  if (a.lse_in) {
    error = launch(copy_lse_kernel, grid(ceil_div<int64_t>(rows, 256)), 256, 0, stream, a);
  } else {
    const AttnBlocks blocks = attn_lse_blocks(a, policy.warps_lse * C::kRowsPerWarp);
    error = launch(attn_lse_kernel<T, kDim>, grid(heads * blocks.per_head), policy.warps_lse * 32, shared_bytes, stream,
                   a, blocks, aligned);
    if (error == cudaSuccess && a.partial) {
      error = launch(combine_lse_kernel, grid(ceil_div<int64_t>(rows, 8)), 256, 0, stream, a);
    }
  }
  if (error != cudaSuccess) return error;
  const AttnBlocks blocks = attn_received_blocks(a, policy.warps_received * C::kRowsPerWarp);
  return launch(attn_received_kernel<T, kDim>, grid(heads * blocks.per_head), policy.warps_received * 32, shared_bytes,
                stream, a, blocks, aligned);
}

}  // namespace

int attn_received_cuda(const AttnReceivedArgs& args, CUstream_st* stream) {
  int error = cudaErrorInvalidValue;
  dispatch_rows(args, [&](auto tag, auto padded) {
    error = launch_passes<typename decltype(tag)::type, decltype(padded)::value>(args, stream);
  });
  return error;
}

}  // namespace tokred
