// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: metric read once and half of num_tokens^2 * dim flops per row. A block takes 64 sources and a share of the
// destinations, 128 at a time: similarities appear in tensor-core accumulators, meet each row's running maximum there
// and are gone. Accumulators are scaled by the rows' inverse norms, summed from the same tiles while they pass by: half
// and bfloat16 values enter the product as they are, and metric is read by nothing else. A destination that nobody may
// choose has the scale NaN, which loses every comparison. Maxima are exact, so the number of shares changes no bit;
// each share writes 8 bytes per source, (key of the similarity, complement of the destination), and the larger one
// wins. The second launch combines the shares, ranks the sources and numbers the output rows.
#include "common/launch.cuh"
#include "common/row_tiles.cuh"
#include "merge/bipartite_match.h"
#include "merge/bipartite_number.cuh"

namespace tokred {
namespace {

constexpr int kThreads = kTileThreads;  // four warps: two by rows, two by columns, 32 x 64 similarities each
constexpr int kStages = 3;              // 72 KiB: three blocks (two of float32, by registers) fill an SM of 227 KiB
constexpr int kSrc = kBipartiteBlockSrc, kDst = kBipartiteBlockDst;

// What a pair's similarity takes beside its product, of a tile.
struct PairTerms {
  float dst_weight[kDst];
  int32_t src_group[kSrc], dst_group[kDst];
};
struct NoTerms {};

template <bool kGeneral>
struct MatchStorage : std::conditional_t<kGeneral, PairTerms, NoTerms> {
  StepTile<kSrc> src[kStages];
  StepTile<kDst> dst[kStages];
  float src_scale[kSrc];
  float dst_scale[kDst];
  unsigned long long best[2][kSrc];  // of the two warps that share a row
};

// Adds the squares of what this thread itself has loaded; no barrier is needed for that.
template <typename T, int kRows>
__device__ inline void thread_add_squares(StepTile<kRows>& tile, float (&sum)[kRows / kRowsPerPass]) {
  constexpr int kPerChunk = 16 / sizeof(T);
  const int column = static_cast<int>(threadIdx.x) % kChunks;
#pragma unroll
  for (int i = 0; i < kRows / kRowsPerPass; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kChunks + i * kRowsPerPass;
    const auto pack = load_pack<kPerChunk>(reinterpret_cast<const T*>(tile.chunk(row, column)));
#pragma unroll
    for (int c = 0; c < kPerChunk; ++c) sum[i] += static_cast<float>(pack.v[c]) * static_cast<float>(pack.v[c]);
  }
}

// Turns the sums of squares into what an accumulator of each row is multiplied by, and clears them.
template <int kRows, typename Allowed>
__device__ inline void write_scales(float (&sum)[kRows / kRowsPerPass], float* scale, const BipartiteMatchArgs& args,
                                    const Allowed& allowed) {
#pragma unroll
  for (int i = 0; i < kRows / kRowsPerPass; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kChunks + i * kRowsPerPass;
    const float norm = sqrtf(warp_sum<kChunks>(sum[i]));
    sum[i] = 0.f;
    if (threadIdx.x % kChunks != 0) continue;
    const float value = args.normalize ? 1.f / (norm < args.eps ? args.eps : norm) : 1.f;
    scale[row] = allowed(row) ? value : __uint_as_float(0x7fc00000u);
  }
}

// The best similarity that this thread has seen for each of its four rows (index 2 m + h: row 16 m + 8 h + lane / 4 of
// the warp's), and its column in the candidates; -1: nothing but NaN so far.
struct ThreadBest {
  float value[4];
  int column[4];
};

// Folds a tile's accumulators and clears them. Columns ascend, only a larger value replaces, and a comparison with NaN
// is false.
template <bool kGeneral>
__device__ inline void thread_fold(float (&acc)[2][8][4], const MatchStorage<kGeneral>& shared,
                                   const BipartiteMatchArgs& args, int first_row, int first_col, int tile_begin,
                                   ThreadBest& best) {
  const int lane = lane_index();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int m = r / 2, h = r % 2, row = first_row + 16 * m + 8 * h + lane / 4;
    const float scale = shared.src_scale[row];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int column = first_col + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
      float& value = acc[m][i / 2][2 * h + i % 2];
      value = value * scale * shared.dst_scale[column];
      if constexpr (kGeneral) {
        value = (value + args.offset) * shared.dst_weight[column];
        if (args.group && shared.src_group[row] != shared.dst_group[column]) value = __uint_as_float(0x7fc00000u);
      }
      if (value > best.value[r]) {
        best.value[r] = value;
        best.column[r] = tile_begin + column;
      }
    }
    if (best.column[r] < 0) {  // -inf is a number, too
#pragma unroll
      for (int i = 15; i >= 0; --i) {
        const int column = first_col + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
        if (acc[m][i / 2][2 * h + i % 2] == best.value[r]) best.column[r] = tile_begin + column;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) acc[i / 32][i / 4 % 8][i % 4] = 0.f;
}

// Thread t writes what belongs to row t of a tile of destinations, and of the sources with the first of them.
template <typename Source, typename Destination>
__device__ inline void thread_write_terms(const BipartiteMatchArgs& args, const BipartiteRow& row, bool first_tile,
                                          const Source& source, const Destination& destination, PairTerms& terms) {
  static_assert(kThreads == kDst && kSrc <= kDst, "a thread per row");
  const int t = static_cast<int>(threadIdx.x);
  const int64_t dst = destination(t), src = first_tile && t < kSrc ? source(t) : -1;
  const float* weight = args.weight + row.batch_idx * args.num_tokens;
  const int32_t* group = args.group + row.batch_idx * args.num_tokens;
  terms.dst_weight[t] = args.weight && dst >= 0 ? weight[dst] : 1.f;
  terms.dst_group[t] = args.group && dst >= 0 ? group[dst] : 0;
  if (first_tile && t < kSrc) terms.src_group[t] = args.group && src >= 0 ? group[src] : 0;
}

// Packs and joins what the lanes and warps that share a row have found; shared.best[*][row] is whole after the barrier.
template <bool kGeneral>
__device__ inline void block_join(const ThreadBest& best, int first_row, int warp_col, MatchStorage<kGeneral>& shared) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    unsigned long long packed = 0;
    if (best.column[r] >= 0) {
      packed = static_cast<unsigned long long>(score_key(best.value[r])) << 32 |
               (0xffffffffu - static_cast<unsigned>(best.column[r]));
    }
    packed = warp_reduce<4>(packed, Max());
    if (lane_index() % 4 == 0)
      shared.best[warp_col][first_row + 16 * (r / 2) + 8 * (r % 2) + lane_index() / 4] = packed;
  }
  __syncthreads();  // both warps of each row have written
}

// Whether a destination of the row is free, given that protect is set; the same in the whole block.
__device__ inline bool block_any_free(const BipartiteMatchArgs& args, const BipartiteRow& row, const uint8_t* protect) {
  int free = 0;
  for (int j = static_cast<int>(threadIdx.x); j < row.num_dst; j += static_cast<int>(blockDim.x)) {
    const int64_t token = destination_token(args, row, j);
    free |= token >= 0 && !protect[token];
  }
  return __syncthreads_or(free) != 0;
}

// grid: batch_size * blocks of sources * splits, the splits of one block side by side: they read the same sources.
// kGeneral: with lists, weights, an offset or groups.
template <typename T, bool kVectorLoads, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kVectorLoads && sizeof(T) == 2 && !kGeneral ? 3 : 2)
    bipartite_match_kernel(const BipartiteMatchArgs args, int num_splits, int num_slots) {
  TOKRED_SHARED(MatchStorage<kGeneral>, shared);
  const int num_blocks = ceil_div(num_slots, kSrc);
  const int split = static_cast<int>(blockIdx.x) % num_splits;
  const int src_begin = static_cast<int>(blockIdx.x) / num_splits % num_blocks * kSrc;
  const BipartiteRow row =
      bipartite_row(args, blockIdx.x / static_cast<unsigned>(num_splits) / static_cast<unsigned>(num_blocks));
  const int num_src = row.num_src, num_dst = row.num_dst;
  if (src_begin >= num_src) return;  // the whole block: a short row
  const int num_tiles = ceil_div(num_dst, kDst);
  const int tile_begin = static_cast<int>(int64_t{num_tiles} * split / num_splits);
  const int tile_end = static_cast<int>(int64_t{num_tiles} * (split + 1) / num_splits);
  const int num_steps = static_cast<int>(max(ceil_div<int64_t>(args.dim * sizeof(T), kStepBytes), int64_t{1}));

  const int64_t stride_row = 2 * args.stride_token;
  const T* metric = static_cast<const T*>(args.metric) + row.batch_idx * args.stride_batch;
  const T* src_rows = metric + 2 * ((args.num_protected + 1) / 2 + src_begin) * args.stride_token;
  const T* dst_rows = metric + (2 * (args.num_protected / 2) + 1) * args.stride_token;
  const uint8_t* protect = args.protect ? args.protect + row.batch_idx * args.num_tokens : nullptr;
  if (protect && !block_any_free(args, row, protect)) protect = nullptr;
  // The token of a slot, -1 past the last one and where it is empty.
  const auto source = [&](int i) { return i < num_src ? source_token(args, row, i) : int64_t{-1}; };
  const auto destination = [&](int j) { return j < num_dst ? destination_token(args, row, j) : int64_t{-1}; };

  const int total = (tile_end - tile_begin) * num_steps;
  int load_tile = tile_begin, load_step = 0;
  const auto load = [&](int it) {  // called for it = 0, 1, ...
    if (it < total) {
      const int stage = it % kStages;
      const int64_t column = int64_t{load_step} * (kStepBytes / sizeof(T));
      if constexpr (kGeneral) {
        thread_load_listed<T, kVectorLoads>(
            shared.src[stage], metric, args.stride_token, [&](int i) { return source(src_begin + i); }, column,
            args.dim);
        thread_load_listed<T, kVectorLoads>(
            shared.dst[stage], metric, args.stride_token, [&](int j) { return destination(load_tile * kDst + j); },
            column, args.dim);
      } else {
        thread_load<T, kVectorLoads>(shared.src[stage], src_rows, stride_row, num_src - src_begin, column, args.dim);
        thread_load<T, kVectorLoads>(shared.dst[stage], dst_rows + int64_t{load_tile} * kDst * stride_row, stride_row,
                                     num_dst - load_tile * kDst, column, args.dim);
      }
      if (++load_step == num_steps) {
        load_step = 0;
        ++load_tile;
      }
    }
    cp_async_commit();
  };

  const int first_row = warp_index() % 2 * 32, first_col = warp_index() / 2 * 64;
  float acc[2][8][4] = {}, src_squares[kSrc / kRowsPerPass] = {}, dst_squares[kDst / kRowsPerPass] = {};
  ThreadBest best;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    best.value[r] = -__uint_as_float(0x7f800000u);
    best.column[r] = -1;
  }
  for (int it = 0; it < kStages - 1; ++it) load(it);
  int tile = tile_begin, step = 0;
  for (int it = 0; it < total; ++it) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // step it is there for all, and step it - 1 is read by all
    load(it + kStages - 1);
    const int stage = it % kStages, dst_begin = tile * kDst;
    if (args.normalize) {
      if (tile == tile_begin) thread_add_squares<T>(shared.src[stage], src_squares);
      thread_add_squares<T>(shared.dst[stage], dst_squares);
    }
    warp_product<T>(shared.src[stage], shared.dst[stage], first_row, first_col, num_dst - dst_begin, acc);
    if (++step < num_steps) continue;
    // The scales' readers of the tile before have passed this step's barrier.
    if (tile == tile_begin) write_scales<kSrc>(src_squares, shared.src_scale, args, [](int) { return true; });
    const auto tile_source = [&](int i) { return source(src_begin + i); };
    const auto tile_destination = [&](int j) { return destination(dst_begin + j); };
    write_scales<kDst>(dst_squares, shared.dst_scale, args, [&](int j) {
      const int64_t token = tile_destination(j);
      return token >= 0 && !(protect && protect[token]);
    });
    if constexpr (kGeneral) {
      thread_write_terms(args, row, tile == tile_begin, tile_source, tile_destination, shared);
    }
    __syncthreads();  // the scales are written
    thread_fold(acc, shared, args, first_row, first_col, dst_begin, best);
    step = 0;
    ++tile;
  }
  block_join(best, first_row, warp_index() / 2, shared);
  const int i = static_cast<int>(threadIdx.x);
  if (i < kSrc && src_begin + i < num_src) {
    const unsigned long long packed = max(shared.best[0][i], shared.best[1][i]);
    args.partial[(split * args.batch_size + row.batch_idx) * num_slots + src_begin + i] = packed;
  }
}

}  // namespace

int bipartite_match_cuda(const BipartiteMatchArgs& args, CUstream_st* stream) {
  const int num_slots = bipartite_slots(args).num_src;
  const BipartiteMatchPolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.metric));
  int error = cudaSuccess;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(policy.match_blocks)), block(kThreads);
    (void)dispatch_int<0, 1, 2, 3>(2 * policy.vector_loads + policy.general, [&](auto kind) {
      constexpr bool kVectorLoads = decltype(kind)::value / 2, kGeneral = decltype(kind)::value % 2;
      error = launch(bipartite_match_kernel<T, kVectorLoads, kGeneral>, grid, block, sizeof(MatchStorage<kGeneral>),
                     stream, args, policy.num_splits, num_slots);
    });
  });
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(args.batch_size)), block(static_cast<unsigned>(policy.number_threads));
  (void)dispatch_int<0, 1, 4>(policy.number_items, [&](auto items) {
    error = launch(bipartite_number_kernel<decltype(items)::value>, grid, block, sizeof(NumberStorage), stream, args,
                   policy.num_splits, num_slots);
  });
  if (error != cudaSuccess || args.order != MatchOrder::kScore) return error;
  const int64_t blocks = ceil_div<int64_t>(num_slots, kBipartiteRankThreads);
  return launch(bipartite_rank_kernel, dim3(static_cast<unsigned>(args.batch_size * blocks)),
                dim3(kBipartiteRankThreads), sizeof(RankStorage), stream, args, num_slots);
}

}  // namespace tokred
