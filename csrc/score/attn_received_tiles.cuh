// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// What both passes of attn_received share: a warp's own rows, a stream of tiles in shared memory, and their product.
#pragma once
#include <initializer_list>

#include "common/cp_async.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "score/attn_received.h"

namespace tokred {

template <typename T, int kDim>
struct AttnConfig {
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int kStep = kIsFloat ? 8 : 16;  // depth of one mma
  static constexpr int kSteps = kDim / kStep;
  // Own rows in registers need every index known. Those in shared memory do not, and the compiler would otherwise load
  // and split all of them ahead of the loop over tiles, into more registers than there are.
  static constexpr int kUnroll = kIsFloat ? 8 : kSteps;
  static constexpr int kRowTiles = kIsFloat || kDim > 128 ? 1 : 2;  // as choose_attn_received_policy says
  static constexpr int kRowsPerWarp = 16 * kRowTiles;
  static constexpr int kMaxThreads = kIsFloat ? 128 : 256;
  static constexpr int kBlocksPerSm = kIsFloat && kDim <= 128 ? 4 : 2;  // registers for that many
  // n8 tiles multiplied at a time: two where the own rows take many registers, to stay below 128.
  static constexpr int kColTiles = kDim > (kIsFloat ? 128 : 64) && (kIsFloat || kRowTiles == 2 || kDim > 192) ? 2 : 4;
  static constexpr int kChunk = 8 * kColTiles;
  static constexpr int kTile = !kIsFloat ? 64 : kDim > 128 ? 16 : 32;  // streamed rows per stage
  static constexpr int kStride = kDim + 16 / sizeof(T);  // rows 16 bytes apart modulo 128: no bank conflicts
  static constexpr int kStages = 2;  // a tile is multiplied for 1,000 cycles and more: the next one has come by then
  static constexpr int kMaxRows = kMaxThreads / kWarpSize * kRowsPerWarp;  // own rows of a block
};

// The keys that some of a number of rows see, and those that all of them see.
struct Seen {
  KeySpan any, all;
};

// The queries or keys of one head of one sequence. Those of paged keys come from data + offset, one each.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int count;
};

// What a block works on. index: of the block among those of its key head and sequence, for what is there to do or more.
struct AttnPlace {
  AttnSequence sequence;
  int kv_head, index;
};

template <typename T, int kDim, int kOwnRows = AttnConfig<T, kDim>::kMaxRows>
struct AttnStorage {
  using C = AttnConfig<T, kDim>;
  T tile[C::kStages][C::kTile][C::kStride];
  AttnPlace place;
  // Beside the streamed tiles. Registers are few: what is the same in all threads is read where it is needed, and which
  // keys a query sees is computed once and read where there is something to mask.
  union {
    struct {  // pass 1
      Rows<T> rows;
      int64_t offset[C::kStages][C::kTile];  // paged; -1: no such key
      bool absent[C::kStages][C::kTile];     // paged
      float bias[C::kStages][C::kTile];
      KeySpan row_sees[C::kMaxRows];
      Seen warp_sees[C::kMaxThreads / kWarpSize];
    } keys;
    struct {  // pass 2
      float lse[C::kStages][C::kTile], weight[C::kStages][C::kTile];
      KeySpan sees[C::kStages][C::kTile];
      float own_bias[C::kMaxRows];
    } queries;
  };
  T own[C::kIsFloat ? kOwnRows : 1][C::kStride];  // float32: the warps' own rows
};

template <typename T>
__device__ inline Rows<T> query_rows(const AttnReceivedArgs& a, const AttnSequence& s, int64_t head) {
  const T* q = static_cast<const T*>(a.q) + s.batch * a.stride_q.batch + head * a.stride_q.head;
  return {q + s.q_begin * a.stride_q.token, a.stride_q.token, s.q_len};
}
template <typename T>
__device__ inline const T* keys_of_head(const AttnReceivedArgs& a, const AttnSequence& s, int64_t kv_head) {
  return static_cast<const T*>(a.k) + s.batch * a.stride_k.batch + kv_head / a.k_repeat * a.stride_k.head;
}

__device__ inline AttnPlace locate(const AttnReceivedArgs& a, const AttnBlocks& blocks) {
  const unsigned per_head = static_cast<unsigned>(blocks.per_head), head = blockIdx.x / per_head;
  int index = static_cast<int>(blockIdx.x % per_head);
  if (!a.packed()) {
    const unsigned num_kv_heads = static_cast<unsigned>(a.num_kv_heads);
    return {a.sequence(head / num_kv_heads), static_cast<int>(head % num_kv_heads), index};
  }
  const int b = warp_search(static_cast<int>(a.batch_size), index, [&](int at) { return blocks.before(a, at); });
  index -= static_cast<int>(blocks.before(a, b));
  return {a.sequence(b), static_cast<int>(head), index};
}

// Rows [first, first + kTile) into a stage, zeros past the last row and past head_dim. offset: where each of them
// starts, -1 for zeros; null: side by side. aligned: by 16-byte copies that the caller commits and waits for; else by
// plain stores. The caller's barrier publishes both.
template <typename T, int kDim>
__device__ inline void block_load_tile(T (*tile)[AttnConfig<T, kDim>::kStride], const Rows<T>& rows, int first,
                                       const int64_t* offset, int head_dim, bool aligned) {
  constexpr int kTile = AttnConfig<T, kDim>::kTile, kVec = 16 / sizeof(T), kVecs = kDim / kVec;
  const auto start = [&](int r) {
    return offset ? offset[r] : first + r < rows.count ? (first + r) * rows.stride : -1;
  };
  if (aligned) {
#pragma unroll 1  // a few copies per thread, which wait for nothing: registers matter more
    for (int i = thread_rank(); i < kTile * kVecs; i += num_threads_in_block()) {
      const int r = i / kVecs, c = i % kVecs * kVec;
      const int64_t from = start(r);
      const bool valid = from >= 0 && c < head_dim;
      cp_async_16(&tile[r][c], rows.data + (valid ? from + c : 0), valid);
    }
  } else {
#pragma unroll 1
    for (int i = thread_rank(); i < kTile * kDim; i += num_threads_in_block()) {
      const int r = i / kDim, c = i % kDim;
      const int64_t from = start(r);
      tile[r][c] = from >= 0 && c < head_dim ? rows.data[from + c] : T(0.f);
    }
  }
}

// Queries [first, first + kTile) of a head into a stage, those before end, with what weighs their products.
template <typename T, int kDim, int kOwnRows>
__device__ inline void block_load_queries(AttnStorage<T, kDim, kOwnRows>& shared, int stage, const AttnReceivedArgs& a,
                                          const AttnSequence s, int head, int first, int end, bool aligned) {
  block_load_tile<T, kDim>(shared.tile[stage], query_rows<T>(a, s, head), first, nullptr, static_cast<int>(a.head_dim),
                           aligned);
  const int r = thread_rank();  // the block has at least kTile threads
  if (r >= AttnConfig<T, kDim>::kTile) return;
  const bool valid = first + r < end;
  const int64_t query = s.q_begin + (valid ? first + r : 0);
  shared.queries.sees[stage][r] = valid ? s.visible(first + r) : KeySpan{0, 0};
  const float* lse = a.lse + (s.batch * a.num_q_heads + head) * a.q_len;
  cp_async_4(&shared.queries.lse[stage][r], lse + query, valid);
  if (!a.q_weight) return;
  const int64_t offset = s.batch * a.stride_weight.batch + head * a.stride_weight.head;
  cp_async_4(&shared.queries.weight[stage][r], a.q_weight + offset + query, valid);
}

// A warp's own rows over the whole depth, 16-bit types: as A fragments in registers. row_at(r): the row, or null for
// zeros.
template <typename T, int kDim>
struct OwnRows {
  using C = AttnConfig<T, kDim>;
  uint32_t a[C::kRowTiles][C::kSteps][4];

  template <typename Storage, typename RowAt>
  __device__ void load(Storage&, RowAt&& row_at, int head_dim, bool aligned) {
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
  using C = AttnConfig<float, kDim>;
  const float (*rows)[C::kStride] = nullptr;

  template <typename Storage, typename RowAt>
  __device__ void load(Storage& shared, RowAt&& row_at, int head_dim, bool) {
    float (*mine)[C::kStride] = shared.own + warp_index() * C::kRowsPerWarp;
    for (int r = 0; r < C::kRowsPerWarp; ++r) {
      const float* row = row_at(r);
      for (int c = lane_index(); c < kDim; c += kWarpSize) mine[r][c] = row && c < head_dim ? row[c] : 0.f;
    }
    rows = mine;
  }
};

// acc[m][n] = own rows 16 m .. times streamed rows 8 n .. of the chunk that starts at tile.
template <typename T, int kDim>
__device__ inline void warp_multiply(float (&acc)[AttnConfig<T, kDim>::kRowTiles][AttnConfig<T, kDim>::kColTiles][4],
                                     const OwnRows<T, kDim>& own, const T (*tile)[AttnConfig<T, kDim>::kStride]) {
  using C = AttnConfig<T, kDim>;
  const int lane = lane_index();
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < C::kColTiles; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.f;
  }
#pragma unroll C::kUnroll
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

// Whether the rows of q and k may be read by 16 bytes at a time.
template <typename T>
bool has_aligned_rows(const AttnReceivedArgs& a) {
  const auto if_many = [](int64_t count, int64_t stride) {
    return static_cast<uint64_t>(count > 1 ? stride : 0) * sizeof(T);
  };
  const uint64_t all = reinterpret_cast<uint64_t>(a.q) | reinterpret_cast<uint64_t>(a.k) |
                       static_cast<uint64_t>(a.head_dim) * sizeof(T) | if_many(a.batch_size, a.stride_q.batch) |
                       if_many(a.num_q_heads, a.stride_q.head) | if_many(a.q_len, a.stride_q.token) |
                       if_many(a.batch_size, a.stride_k.batch) | if_many(a.num_kv_heads, a.stride_k.head) |
                       if_many(a.kv_len, a.stride_k.token) | if_many(a.num_pages, a.stride_page);
  return all % 16 == 0;
}

// f(Tag<T>{}, the depth that head_dim is padded to with zeros): the sizes of real models for 16-bit types (none below
// 64, where the exponential binds anyway), a power of two for float32.
template <typename F>
void dispatch_rows(const AttnReceivedArgs& a, const F& f) {
  const int head_dim = static_cast<int>(a.head_dim);
  const auto smallest_above = [&](std::initializer_list<int> sizes) {
    for (const int size : sizes) {
      if (head_dim <= size) return size;
    }
    return 0;
  };
  dispatch_float(a.dtype, [&](auto tag) {
    const auto run = [&](auto padded) { f(tag, padded); };
    if constexpr (sizeof(typename decltype(tag)::type) == 4) {
      (void)dispatch_int<64, 128, 256>(smallest_above({64, 128, 256}), run);
    } else {
      (void)dispatch_int<64, 80, 96, 128, 160, 192, 256>(smallest_above({64, 80, 96, 128, 160, 192, 256}), run);
    }
  });
}

}  // namespace tokred
