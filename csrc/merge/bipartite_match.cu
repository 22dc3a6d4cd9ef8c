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

struct MatchStorage {
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
__device__ inline void thread_fold(float (&acc)[2][8][4], const MatchStorage& shared, int first_row, int first_col,
                                   int tile_begin, ThreadBest& best) {
  const int lane = lane_index();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int m = r / 2, h = r % 2;
    const float scale = shared.src_scale[first_row + 16 * m + 8 * h + lane / 4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int column = first_col + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
      float& value = acc[m][i / 2][2 * h + i % 2];
      value = value * scale * shared.dst_scale[column];
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

// Packs and joins what the lanes and warps that share a row have found; shared.best[*][row] is whole after the barrier.
__device__ inline void block_join(const ThreadBest& best, int first_row, int warp_col, MatchStorage& shared) {
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
__device__ inline bool block_any_free(const uint8_t* protect, const BipartiteSets& sets) {
  int free = 0;
  for (int64_t j = sets.first_dst + threadIdx.x; j < sets.num_dst; j += blockDim.x) free |= !protect[2 * j + 1];
  return __syncthreads_or(free) != 0;
}

// grid: batch_size * blocks of sources * splits, the splits of one block side by side: they read the same sources.
template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kThreads, kVectorLoads && sizeof(T) == 2 ? 3 : 2)
    bipartite_match_kernel(const BipartiteMatchArgs args, int num_splits) {
  TOKRED_SHARED(MatchStorage, shared);
  const BipartiteSets sets = bipartite_sets(args.num_tokens, args.num_protected);
  const int num_blocks = static_cast<int>(ceil_div<int64_t>(sets.candidate_src(), kSrc));
  const int num_tiles = static_cast<int>(ceil_div<int64_t>(sets.candidate_dst(), kDst));
  const int split = static_cast<int>(blockIdx.x) % num_splits;
  const int src_begin = static_cast<int>(blockIdx.x) / num_splits % num_blocks * kSrc;
  const int64_t batch_idx = blockIdx.x / static_cast<unsigned>(num_splits) / static_cast<unsigned>(num_blocks);
  const int tile_begin = static_cast<int>(int64_t{num_tiles} * split / num_splits);
  const int tile_end = static_cast<int>(int64_t{num_tiles} * (split + 1) / num_splits);
  const int num_dst = static_cast<int>(sets.candidate_dst()), num_src = static_cast<int>(sets.candidate_src());
  const int num_steps = static_cast<int>(max(ceil_div<int64_t>(args.dim * sizeof(T), kStepBytes), int64_t{1}));

  const int64_t stride_row = 2 * args.stride_token;
  const T* metric = static_cast<const T*>(args.metric) + batch_idx * args.stride_batch;
  const T* src_rows = metric + (sets.first_src + src_begin) * stride_row;
  const T* dst_rows = metric + sets.first_dst * stride_row + args.stride_token;
  const uint8_t* protect = args.protect ? args.protect + batch_idx * args.num_tokens : nullptr;
  if (protect && !block_any_free(protect, sets)) protect = nullptr;

  const int total = (tile_end - tile_begin) * num_steps;
  int load_tile = tile_begin, load_step = 0;
  const auto load = [&](int it) {  // called for it = 0, 1, ...
    if (it < total) {
      const int stage = it % kStages;
      const int64_t column = int64_t{load_step} * (kStepBytes / sizeof(T));
      thread_load<T, kVectorLoads>(shared.src[stage], src_rows, stride_row, num_src - src_begin, column, args.dim);
      thread_load<T, kVectorLoads>(shared.dst[stage], dst_rows + int64_t{load_tile} * kDst * stride_row, stride_row,
                                   num_dst - load_tile * kDst, column, args.dim);
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
    write_scales<kDst>(dst_squares, shared.dst_scale, args, [&](int row) {
      const int j = dst_begin + row;
      return j < num_dst && !(protect && protect[2 * (sets.first_dst + j) + 1]);
    });
    __syncthreads();  // the scales are written
    thread_fold(acc, shared, first_row, first_col, dst_begin, best);
    step = 0;
    ++tile;
  }
  block_join(best, first_row, warp_index() / 2, shared);
  const int row = static_cast<int>(threadIdx.x);
  if (row < kSrc && src_begin + row < num_src) {
    const unsigned long long packed = max(shared.best[0][row], shared.best[1][row]);
    args.partial[(split * args.batch_size + batch_idx) * num_src + src_begin + row] = packed;
  }
}

}  // namespace

int bipartite_match_cuda(const BipartiteMatchArgs& args, CUstream_st* stream) {
  const BipartiteSets sets = bipartite_sets(args.num_tokens, args.num_protected);
  const BipartiteMatchPolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.metric));
  int error = cudaSuccess;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(policy.match_blocks)), block(kThreads);
    error = policy.vector_loads ? launch(bipartite_match_kernel<T, true>, grid, block, sizeof(MatchStorage), stream,
                                         args, policy.num_splits)
                                : launch(bipartite_match_kernel<T, false>, grid, block, sizeof(MatchStorage), stream,
                                         args, policy.num_splits);
  });
  if (error != cudaSuccess) return error;
  if (args.order == MatchOrder::kScore) {
    const int64_t blocks = ceil_div<int64_t>(sets.num_src, kBipartiteRankThreads);
    return launch(bipartite_rank_kernel, dim3(static_cast<unsigned>(args.batch_size * blocks)),
                  dim3(kBipartiteRankThreads), sizeof(RankStorage), stream, args, policy.num_splits);
  }
  const dim3 grid(static_cast<unsigned>(args.batch_size)), block(static_cast<unsigned>(policy.number_threads));
  (void)dispatch_int<0, 1, 4>(policy.number_items, [&](auto items) {
    error = launch(bipartite_number_kernel<decltype(items)::value>, grid, block, sizeof(NumberStorage), stream, args,
                   policy.num_splits);
  });
  return error;
}

}  // namespace tokred
