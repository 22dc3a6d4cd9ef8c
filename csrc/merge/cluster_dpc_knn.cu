// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: the products of all pairs, once for densities and half once more for the nearest denser tokens, and of tokens
// with centres. Nine launches, since each of those needs the ranking that the one before ends with; no matrix is
// stored. A thread keeps the nearest distances of its four rows in registers, sorted by exchanges, so that a distance
// that is none of them costs one comparison. In the order of density the denser tokens are those before, so the second
// pass meets tiles up to the diagonal only. Minima, and lists by rank, do not depend on who writes first: shares of the
// columns and atomics change no bit.
#include "common/block.cuh"
#include "common/launch.cuh"
#include "common/score_key.h"
#include "merge/cluster_dpc_knn.h"
#include "merge/cluster_tiles.cuh"

namespace tokred {
namespace {

constexpr uint32_t kInfBits = 0x7f800000u;

template <typename T>
__device__ inline const T* first_row(const ClusterDpcArgs& a, int64_t batch_idx, const DpcSpan& span) {
  return static_cast<const T*>(a.x) + batch_idx * a.stride_batch + span.begin * a.stride_token;
}
// All tokens of a sequence, and some by list.
template <typename T>
__device__ inline ClusterTileRows<T, false> all_rows(const ClusterDpcArgs& a, int64_t batch_idx, const DpcSpan& span) {
  return {first_row<T>(a, batch_idx, span), a.stride_token, nullptr, static_cast<int>(span.len)};
}
template <typename T>
__device__ inline ClusterTileRows<T, true> listed_rows(const ClusterDpcArgs& a, int64_t batch_idx, const DpcSpan& span,
                                                       const int32_t* list, int64_t count) {
  return {first_row<T>(a, batch_idx, span), a.stride_token, list, static_cast<int>(count)};
}
__device__ inline bool is_dropped(const ClusterDpcArgs& a, int64_t token) { return a.drop_mask && a.drop_mask[token]; }

// What a block works at when sequences have per_sequence blocks each.
struct BlockPlace {
  int64_t batch_idx;
  int block;
};
__device__ inline BlockPlace block_place(int64_t block, int64_t per_sequence) {
  return {block / per_sequence, static_cast<int>(block % per_sequence)};
}

// grid: batch_size * blocks of kDpcPrepareRows tokens. Squared norms, and what later launches start from.
template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kTileThreads) dpc_prepare_kernel(const ClusterDpcArgs a) {
  TOKRED_SHARED(StepTile<kTileThreads>, shared);
  static_assert(kDpcPrepareRows == kTileThreads, "one token each");
  const int64_t thread = int64_t{blockIdx.x} * kTileThreads + threadIdx.x, threads = int64_t{gridDim.x} * kTileThreads;
  if (thread < a.batch_size) a.farthest[thread] = 0;
  for (int64_t i = thread; a.cu_seqlens && i < a.num_tokens; i += threads) {  // of tokens that belong to no sequence
    a.dst_idx[i] = -1;
    a.score[i] = a.log_density[i] = -__uint_as_float(kInfBits);
  }
  const BlockPlace at = block_place(blockIdx.x, dpc_prepare_blocks(a));
  const DpcSpan span = dpc_span(a, at.batch_idx);
  block_cluster_squares<T, kVectorLoads>(shared, all_rows<T>(a, at.batch_idx, span), at.block * kDpcPrepareRows, a.dim,
                                         [&](int row, float square) {
                                           const int64_t token = span.first + row;
                                           const float none = __uint_as_float(0x7fc00000u);
                                           a.square[token] = is_dropped(a, token) ? none : dpc_square(square);
                                           a.denser[token] = kInfBits;
                                           a.nearest[token] = ~0ull;
                                         });
}

// Puts a distance into an ascending list, out of which the largest falls. NaN changes nothing.
template <int kKept>
__device__ inline void thread_keep(float (&list)[kKept], float distance) {
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const float kept = list[i];
    list[i] = distance < kept ? distance : kept;
    distance = distance < kept ? kept : distance;
  }
}

// grid: batch_size * row_blocks * splits, the splits of one block side by side: they read the same rows.
template <typename T, bool kVectorLoads, int kKept>
__global__ void __launch_bounds__(kTileThreads, 2)
    dpc_nearest_kernel(const ClusterDpcArgs a, int64_t row_blocks, int num_splits) {
  TOKRED_SHARED(ClusterTileStorage, shared);
  const int split = static_cast<int>(blockIdx.x) % num_splits;
  const BlockPlace at = block_place(blockIdx.x / static_cast<unsigned>(num_splits), row_blocks);
  const DpcSpan span = dpc_span(a, at.batch_idx);
  const int row_begin = at.block * kClusterBlockRows;
  if (row_begin >= span.len) return;  // the whole block
  const ClusterTileRows<T, false> rows = all_rows<T>(a, at.batch_idx, span);
  const int num_tiles = static_cast<int>(ceil_div<int64_t>(span.len, kClusterBlockCols));
  float list[4][kKept], largest = 0.f;
#pragma unroll
  for (int i = 0; i < 4 * kKept; ++i) list[i / kKept][i % kKept] = __uint_as_float(kInfBits);
  const auto square_of = [&](int row) { return a.square[span.first + row]; };
  block_for_cluster_pairs<T, kVectorLoads>(shared, rows, row_begin, rows, num_tiles * split / num_splits,
                                           num_tiles * (split + 1) / num_splits, a.dim, square_of, square_of,
                                           [&](int r, int, int, float product, float row_square, float col_square) {
                                             const float distance = cluster_distance(product, row_square, col_square);
                                             if (distance > largest) largest = distance;
                                             if (distance < list[r][kKept - 1]) thread_keep(list[r], distance);
                                           });
  largest = warp_max(largest);
  if (lane_index() == 0 && largest > 0.f) atomicMax(a.farthest + at.batch_idx, __float_as_uint(largest));
  // Four lanes share a row, and so do two warps, whose lists are shares of their own.
  const int64_t tokens = a.cu_seqlens ? a.num_tokens : a.batch_size * a.num_tokens;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      float other[kKept];
#pragma unroll
      for (int i = 0; i < kKept; ++i) other[i] = __shfl_xor_sync(kFullMask, list[r][i], offset);
#pragma unroll
      for (int i = 0; i < kKept; ++i) thread_keep(list[r], other[i]);
    }
    const int row = thread_cluster_row(row_begin, r);
    if (lane_index() % 4 != 0 || row >= span.len) continue;
    float* to = a.partial + ((2 * split + warp_index() / 2) * tokens + span.first + row) * kKept;
#pragma unroll
    for (int i = 0; i < kKept; ++i) to[i] = list[r][i];
  }
}

// grid: batch_size * blocks of kDpcTokenThreads tokens, one thread each.
template <int kKept>
__global__ void __launch_bounds__(kDpcTokenThreads) dpc_density_kernel(const ClusterDpcArgs a, int num_lists) {
  const BlockPlace at = block_place(blockIdx.x, ceil_div<int64_t>(a.max_seqlen, kDpcTokenThreads));
  const DpcSpan span = dpc_span(a, at.batch_idx);
  const int64_t in_sequence = int64_t{at.block} * kDpcTokenThreads + threadIdx.x, token = span.first + in_sequence;
  if (in_sequence >= span.len) return;
  const int64_t tokens = a.cu_seqlens ? a.num_tokens : a.batch_size * a.num_tokens;
  float list[kKept], sum = 0.f;
#pragma unroll
  for (int i = 0; i < kKept; ++i) list[i] = __uint_as_float(kInfBits);
  for (int from = 0; from < num_lists; ++from) {
    const float* other = a.partial + (from * tokens + token) * kKept;
#pragma unroll
    for (int i = 0; i < kKept; ++i) thread_keep(list, other[i]);
  }
  int count = 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (i >= a.k || !(list[i] < __uint_as_float(kInfBits))) continue;
    sum += list[i];
    ++count;
  }
  a.log_density[token] =
      is_dropped(a, token) ? -__uint_as_float(kInfBits) : dpc_log_density(a, sum, count, a.square[token], in_sequence);
}

struct RankStorage {
  unsigned long long keys[4 * kDpcRankThreads];
};

// The rank of each of a block's kDpcRankThreads / kDpcRankLanes tokens among all of its sequence: how many have a
// higher key. keys are unique; key_at(token) is called for tokens of the sequence. kDpcRankLanes threads share a token,
// each of which has the rank.
template <typename KeyAt>
__device__ inline int block_rank(RankStorage& shared, int64_t len, unsigned long long own, const KeyAt& key_at) {
  constexpr int kKeys = sizeof(shared.keys) / sizeof(shared.keys[0]);
  int higher = 0;
  for (int64_t first = 0; first < len; first += kKeys) {
    const int here = static_cast<int>(min(len - first, int64_t{kKeys}));
    __syncthreads();  // the keys before are read by all
    for (int i = static_cast<int>(threadIdx.x); i < here; i += kDpcRankThreads) shared.keys[i] = key_at(first + i);
    __syncthreads();  // the keys are there for all
    for (int i = static_cast<int>(threadIdx.x) % kDpcRankLanes; i < here; i += kDpcRankLanes) {
      higher += shared.keys[i] > own;
    }
  }
  return warp_sum<kDpcRankLanes>(higher);
}
// Falls with the score, then rises with the index; excluded tokens come last.
__device__ inline unsigned long long rank_key(float score, bool excluded, int64_t token) {
  return static_cast<unsigned long long>(excluded ? kKeyExcluded : score_key(score)) << 32 |
         (0xffffffffu - static_cast<uint32_t>(token));
}

// grid: batch_size * blocks of tokens that are ranked. Writes the tokens in the order of density.
__global__ void __launch_bounds__(kDpcRankThreads) dpc_rank_kernel(const ClusterDpcArgs a) {
  TOKRED_SHARED(RankStorage, shared);
  constexpr int kTokens = kDpcRankThreads / kDpcRankLanes;
  const BlockPlace at = block_place(blockIdx.x, ceil_div<int64_t>(a.max_seqlen, kTokens));
  const DpcSpan span = dpc_span(a, at.batch_idx);
  if (int64_t{at.block} * kTokens >= span.len) return;  // the whole block
  const int64_t token = int64_t{at.block} * kTokens + threadIdx.x / kDpcRankLanes;
  const auto key_at = [&](int64_t i) {
    return rank_key(a.log_density[span.first + i], is_dropped(a, span.first + i), i);
  };
  const int rank = block_rank(shared, span.len, token < span.len ? key_at(token) : 0, key_at);
  if (token < span.len && threadIdx.x % kDpcRankLanes == 0) a.order[span.first + rank] = static_cast<int32_t>(token);
}

// grid: as dpc_nearest_kernel, the longest rows first. Rows and columns are tokens in the order of density.
template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kTileThreads, 2)
    dpc_denser_kernel(const ClusterDpcArgs a, int64_t row_blocks, int num_splits) {
  TOKRED_SHARED(ClusterTileStorage, shared);
  const int split = static_cast<int>(blockIdx.x) % num_splits;
  const BlockPlace at = block_place(blockIdx.x / static_cast<unsigned>(num_splits), row_blocks);
  const DpcSpan span = dpc_span(a, at.batch_idx);
  const int row_begin = (static_cast<int>(row_blocks) - 1 - at.block) * kClusterBlockRows;
  if (row_begin >= span.len) return;  // the whole block
  const int32_t* order = a.order + span.first;
  const ClusterTileRows<T, true> rows = listed_rows<T>(a, at.batch_idx, span, order, span.len);
  const int num_tiles = static_cast<int>(
      ceil_div(min(static_cast<int>(span.len), row_begin + kClusterBlockRows), int{kClusterBlockCols}));
  float smallest[4];
#pragma unroll
  for (float& value : smallest) value = __uint_as_float(kInfBits);
  const auto square_of = [&](int row) { return a.square[span.first + row]; };
  block_for_cluster_pairs<T, kVectorLoads>(
      shared, rows, row_begin, rows, num_tiles * split / num_splits, num_tiles * (split + 1) / num_splits, a.dim,
      square_of, square_of, [&](int r, int row, int col, float product, float row_square, float col_square) {
        const float distance = cluster_distance(product, row_square, col_square);
        if (col < row && distance < smallest[r]) smallest[r] = distance;
      });
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t bits = warp_reduce<4>(__float_as_uint(smallest[r]), Min());
    const int row = thread_cluster_row(row_begin, r);
    if (lane_index() % 4 == 0 && row < span.len && bits != kInfBits) {
      atomicMin(a.denser + span.first + order[row], bits);
    }
  }
}

// grid: as dpc_rank_kernel. Scores, and the rank of those that are centres.
__global__ void __launch_bounds__(kDpcRankThreads) dpc_score_kernel(const ClusterDpcArgs a) {
  TOKRED_SHARED(RankStorage, shared);
  constexpr int kTokens = kDpcRankThreads / kDpcRankLanes;
  const BlockPlace at = block_place(blockIdx.x, ceil_div<int64_t>(a.max_seqlen, kTokens));
  const DpcSpan span = dpc_span(a, at.batch_idx);
  if (int64_t{at.block} * kTokens >= span.len) return;  // the whole block
  const int64_t in_sequence = int64_t{at.block} * kTokens + threadIdx.x / kDpcRankLanes;
  const int32_t densest = a.order[span.first];
  const auto score_of = [&](int64_t i) {
    const int64_t token = span.first + i;
    const float log_density = a.log_density[token];
    if (is_dropped(a, token) || !(a.square[token] == a.square[token])) return log_density;  // -inf, NaN
    return dpc_score(a, log_density, __uint_as_float(i == densest ? a.farthest[at.batch_idx] : a.denser[token]));
  };
  const auto key_at = [&](int64_t i) { return rank_key(score_of(i), is_dropped(a, span.first + i), i); };
  const bool mine = in_sequence < span.len;
  const int rank = block_rank(shared, span.len, mine ? key_at(in_sequence) : 0, key_at);
  if (!mine || threadIdx.x % kDpcRankLanes != 0) return;
  const int64_t token = span.first + in_sequence;
  a.score[token] = score_of(in_sequence);
  a.slot[token] = rank < a.num_clusters && !is_dropped(a, token) ? rank : -1;
}

struct CentreStorage {
  BlockScratch block;
};

// grid: batch_size. Numbers the centres.
__global__ void __launch_bounds__(kDpcCentreThreads) dpc_centres_kernel(const ClusterDpcArgs a) {
  TOKRED_SHARED(CentreStorage, shared);
  const int64_t batch_idx = blockIdx.x;
  const DpcSpan span = dpc_span(a, batch_idx);
  int64_t* out = a.centre_idx + batch_idx * a.num_clusters;
  int count = 0;
  for (int64_t first = 0; first < span.len; first += kDpcCentreThreads) {
    const int64_t in_sequence = first + threadIdx.x, token = span.first + in_sequence;
    const int rank = in_sequence < span.len ? a.slot[token] : -1;
    int total;
    const int place = count + block_exclusive_scan(rank >= 0 ? 1 : 0, shared.block, &total);
    count += total;
    if (rank < 0) continue;  // no barrier is left out: the scan is above
    const int slot = a.by_score ? rank : place;
    a.slot[token] = slot;
    a.centre[span.first + place] = static_cast<int32_t>(in_sequence);
    a.cluster[span.first + place] = slot;
    out[slot] = in_sequence;
  }
  for (int64_t i = count + threadIdx.x; i < a.num_clusters; i += kDpcCentreThreads) out[i] = -1;
  if (threadIdx.x == 0) a.num_centres[batch_idx] = count;
}

// grid: batch_size * row_blocks * splits of the centres.
template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kTileThreads, 2)
    dpc_assign_kernel(const ClusterDpcArgs a, int64_t row_blocks, int num_splits) {
  TOKRED_SHARED(ClusterTileStorage, shared);
  const int split = static_cast<int>(blockIdx.x) % num_splits;
  const BlockPlace at = block_place(blockIdx.x / static_cast<unsigned>(num_splits), row_blocks);
  const DpcSpan span = dpc_span(a, at.batch_idx);
  const int row_begin = at.block * kClusterBlockRows;
  if (row_begin >= span.len) return;  // the whole block
  const int num_centres = a.num_centres[at.batch_idx];
  const int num_tiles = ceil_div(num_centres, int{kClusterBlockCols});
  float smallest[4];
  int place[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    smallest[r] = __uint_as_float(kInfBits);
    place[r] = -1;
  }
  const auto square_of = [&](int row) { return a.square[span.first + row]; };
  block_for_cluster_pairs<T, kVectorLoads>(shared, all_rows<T>(a, at.batch_idx, span), row_begin,
                                           listed_rows<T>(a, at.batch_idx, span, a.centre + span.first, num_centres),
                                           num_tiles * split / num_splits, num_tiles * (split + 1) / num_splits, a.dim,
                                           square_of, square_of,
                                           [&](int r, int, int col, float product, float row_square, float col_square) {
                                             const float distance = cluster_distance(product, row_square, col_square);
                                             if (distance < smallest[r]) {  // columns ascend: ties stay with the lowest
                                               smallest[r] = distance;
                                               place[r] = col;
                                             }
                                           });
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    unsigned long long best = ~0ull;
    if (place[r] >= 0) {
      best = static_cast<unsigned long long>(__float_as_uint(smallest[r])) << 32 | static_cast<unsigned>(place[r]);
    }
    best = warp_reduce<4>(best, Min());
    const int row = thread_cluster_row(row_begin, r);
    if (lane_index() % 4 == 0 && row < span.len && best != ~0ull) atomicMin(a.nearest + span.first + row, best);
  }
}

// grid: as dpc_density_kernel. A token that is nearest to none goes to the first centre.
__global__ void __launch_bounds__(kDpcTokenThreads) dpc_finish_kernel(const ClusterDpcArgs a) {
  const BlockPlace at = block_place(blockIdx.x, ceil_div<int64_t>(a.max_seqlen, kDpcTokenThreads));
  const DpcSpan span = dpc_span(a, at.batch_idx);
  const int64_t in_sequence = int64_t{at.block} * kDpcTokenThreads + threadIdx.x, token = span.first + in_sequence;
  if (in_sequence >= span.len) return;
  int64_t slot = a.slot[token];
  if (slot < 0 && !is_dropped(a, token) && a.num_centres[at.batch_idx] > 0) {
    const unsigned long long best = a.nearest[token];
    slot = a.cluster[span.first + (best == ~0ull ? 0 : static_cast<int64_t>(best & 0xffffffffu))];
  }
  a.dst_idx[token] = slot;
}

template <typename T, bool kVectorLoads, int kKept>
int run(const ClusterDpcArgs& a, const ClusterDpcPolicy& policy, CUstream_st* stream) {
  const auto by_tokens = [&](int64_t per_block) {
    return dim3(static_cast<unsigned>(a.batch_size * ceil_div(a.max_seqlen, per_block)));
  };
  const int64_t row_blocks = a.batch_size * policy.row_blocks;
  const dim3 pairs(static_cast<unsigned>(row_blocks * policy.splits)), tile(kTileThreads);
  const dim3 ranked = by_tokens(kDpcRankThreads / kDpcRankLanes), ranking(kDpcRankThreads);
  int error =
      launch(dpc_prepare_kernel<T, kVectorLoads>, dim3(static_cast<unsigned>(a.batch_size * dpc_prepare_blocks(a))),
             tile, sizeof(StepTile<kTileThreads>), stream, a);
  if (error != cudaSuccess) return error;
  error = launch(dpc_nearest_kernel<T, kVectorLoads, kKept>, pairs, tile, sizeof(ClusterTileStorage), stream, a,
                 policy.row_blocks, policy.splits);
  if (error != cudaSuccess) return error;
  error = launch(dpc_density_kernel<kKept>, by_tokens(kDpcTokenThreads), dim3(kDpcTokenThreads), 0, stream, a,
                 2 * policy.splits);
  if (error != cudaSuccess) return error;
  error = launch(dpc_rank_kernel, ranked, ranking, sizeof(RankStorage), stream, a);
  if (error != cudaSuccess) return error;
  error = launch(dpc_denser_kernel<T, kVectorLoads>, pairs, tile, sizeof(ClusterTileStorage), stream, a,
                 policy.row_blocks, policy.splits);
  if (error != cudaSuccess) return error;
  error = launch(dpc_score_kernel, ranked, ranking, sizeof(RankStorage), stream, a);
  if (error != cudaSuccess) return error;
  error = launch(dpc_centres_kernel, dim3(static_cast<unsigned>(a.batch_size)), dim3(kDpcCentreThreads),
                 sizeof(CentreStorage), stream, a);
  if (error != cudaSuccess) return error;
  error = launch(dpc_assign_kernel<T, kVectorLoads>, dim3(static_cast<unsigned>(row_blocks * policy.centre_splits)),
                 tile, sizeof(ClusterTileStorage), stream, a, policy.row_blocks, policy.centre_splits);
  if (error != cudaSuccess) return error;
  return launch(dpc_finish_kernel, by_tokens(kDpcTokenThreads), dim3(kDpcTokenThreads), 0, stream, a);
}

}  // namespace

int cluster_dpc_knn_cuda(const ClusterDpcArgs& args, CUstream_st* stream) {
  const ClusterDpcPolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.x));
  int error = cudaErrorInvalidValue;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    (void)dispatch_int<8, 16>(policy.kept, [&](auto kept) {
      constexpr int kKept = decltype(kept)::value;
      error =
          policy.vector_loads ? run<T, true, kKept>(args, policy, stream) : run<T, false, kKept>(args, policy, stream);
    });
  });
  return error;
}

}  // namespace tokred
