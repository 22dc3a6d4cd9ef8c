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
#include "common/pair_tiles.cuh"
#include "merge/bipartite_match.h"
#include "merge/bipartite_number.cuh"

namespace tokred {
namespace {

constexpr int kSrc = kBipartiteBlockSrc, kDst = kBipartiteBlockDst;
static_assert(kSrc == kPairBlockX && kDst == kPairBlockY, "as the policy counts blocks");

struct MatchStorage {
  PairTiles<> tiles;
  unsigned long long best[2][kSrc];  // of the two warps that share a row
};

// Whether a destination of the row is free, given that protect is set; the same in the whole block.
__device__ inline bool block_any_free(const uint8_t* protect, const BipartiteSets& sets) {
  int free = 0;
  for (int64_t j = sets.first_dst + threadIdx.x; j < sets.num_dst; j += blockDim.x) free |= !protect[2 * j + 1];
  return __syncthreads_or(free) != 0;
}

// grid: batch_size * blocks of sources * splits, the splits of one block side by side: they read the same sources.
template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kTileThreads, kVectorLoads && sizeof(T) == 2 ? 3 : 2)
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
  const int64_t stride_row = 2 * args.stride_token;
  const T* metric = static_cast<const T*>(args.metric) + batch_idx * args.stride_batch;
  const T* src_rows = metric + (sets.first_src + src_begin) * stride_row;
  const T* dst_rows = metric + sets.first_dst * stride_row + args.stride_token;
  const uint8_t* protect = args.protect ? args.protect + batch_idx * args.num_tokens : nullptr;
  if (protect && !block_any_free(protect, sets)) protect = nullptr;

  const auto scale = [&](float square) {
    const float norm = sqrtf(square);
    return args.normalize ? 1.f / (norm < args.eps ? args.eps : norm) : 1.f;
  };
  PairBest best;
  block_meet<T, kVectorLoads>(
      shared.tiles, PairRows<T>{src_rows, stride_row, num_src - src_begin}, PairRows<T>{dst_rows, stride_row, num_dst},
      args.dim, tile_begin, tile_end, args.normalize, [&](int, float square) { return scale(square); },
      [&](int64_t j, float square) {
        const bool allowed = j < num_dst && !(protect && protect[2 * (sets.first_dst + j) + 1]);
        return allowed ? scale(square) : __uint_as_float(0x7fc00000u);
      },
      [&](PairAcc& acc, int first_dst) {
        thread_fold_best(
            acc, first_dst,
            [&](int row, int column, float product) {
              return product * shared.tiles.x_term[row] * shared.tiles.y_term[column];
            },
            best);
      });
  unsigned long long packed[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    packed[r] = best.column[r] < 0 ? 0
                                   : static_cast<unsigned long long>(score_key(best.value[r])) << 32 |
                                         (0xffffffffu - static_cast<unsigned>(best.column[r]));
  }
  warp_join_best(packed, shared.best);
  __syncthreads();  // both warps of each row have written
  const int row = static_cast<int>(threadIdx.x);
  if (row < kSrc && src_begin + row < num_src) {
    args.partial[(split * args.batch_size + batch_idx) * num_src + src_begin + row] =
        max(shared.best[0][row], shared.best[1][row]);
  }
}

}  // namespace

int bipartite_match_cuda(const BipartiteMatchArgs& args, CUstream_st* stream) {
  const BipartiteSets sets = bipartite_sets(args.num_tokens, args.num_protected);
  const BipartiteMatchPolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.metric));
  int error = cudaSuccess;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(policy.match_blocks)), block(kTileThreads);
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
