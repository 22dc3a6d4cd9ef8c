// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: the products of tokens with centroids and the tokens read once more, in each iteration. How many launches
// there are follows from num_clusters (each start needs the one before) and max_iter alone: what an iteration finds
// stays on the device, and the blocks of a row that has converged return at once. Means are segment_merge's, so no sum
// depends on who comes first.
#include "common/block.cuh"
#include "common/launch.cuh"
#include "common/score_key.h"
#include "merge/cluster_kmeans.h"
#include "merge/cluster_tiles.cuh"

namespace tokred {
namespace {

template <typename T>
__device__ inline const T* token_row(const ClusterKmeansArgs& a, int64_t batch_idx, int64_t token) {
  return static_cast<const T*>(a.x) + batch_idx * a.stride_batch + token * a.stride_token;
}
template <typename T>
__device__ inline ClusterTileRows<T, false> tokens_of(const ClusterKmeansArgs& a, int64_t batch_idx) {
  return {token_row<T>(a, batch_idx, 0), a.stride_token, nullptr, static_cast<int>(a.num_tokens)};
}
template <typename T>
__device__ inline ClusterTileRows<T, false> centroids_of(const ClusterKmeansArgs& a, int64_t batch_idx) {
  return {static_cast<const T*>(a.centroids) + batch_idx * a.num_clusters * a.dim, a.dim, nullptr,
          static_cast<int>(a.num_clusters)};
}

// The sum of squared differences of two rows, or of their products; in every lane.
template <typename T>
__device__ inline float warp_row_sum(const T* a, const T* b, int64_t dim, bool products) {
  float sum = 0.f;
  for (int64_t c = lane_index(); c < dim; c += kWarpSize) {
    const float x = static_cast<float>(a[c]), y = static_cast<float>(b[c]);
    sum += products ? x * y : (x - y) * (x - y);
  }
  return warp_sum(sum);
}

// grid: batch_size * blocks of kKmeansPrepareRows tokens.
template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kTileThreads) kmeans_prepare_kernel(const ClusterKmeansArgs a) {
  TOKRED_SHARED(StepTile<kTileThreads>, shared);
  const int64_t blocks = ceil_div<int64_t>(a.num_tokens, kKmeansPrepareRows), batch_idx = blockIdx.x / blocks;
  block_cluster_squares<T, kVectorLoads>(
      shared, tokens_of<T>(a, batch_idx), static_cast<int>(blockIdx.x % blocks) * kKmeansPrepareRows, a.dim,
      [&](int row, float square) {
        const int64_t token = batch_idx * a.num_tokens + row;
        a.term[token] = kmeans_term(a.cosine, square, a.drop_mask && a.drop_mask[token]);
        a.distance[token] = __uint_as_float(0x7f800000u);
        a.nearest[token] = ~0ull;
      });
}

// grid: batch_size. Clears what the rows start with.
__global__ void __launch_bounds__(kKmeansThreads) kmeans_clear_kernel(const ClusterKmeansArgs a) {
  const int64_t batch_idx = blockIdx.x;
  for (int64_t j = threadIdx.x; j < a.num_clusters; j += kKmeansThreads) a.pick[batch_idx * a.num_clusters + j] = 0;
  if (threadIdx.x == 0) a.done[batch_idx] = a.num_iter[batch_idx] = 0;
}

// grid: batch_size * blocks of kKmeansTokensPerBlock tokens. Chooses start number step, given the ones before.
template <typename T>
__global__ void __launch_bounds__(kKmeansThreads) kmeans_start_kernel(const ClusterKmeansArgs a, int64_t step) {
  const int64_t blocks = ceil_div<int64_t>(a.num_tokens, kKmeansTokensPerBlock), batch_idx = blockIdx.x / blocks;
  const int64_t begin =
      static_cast<int64_t>(blockIdx.x) % blocks * kKmeansTokensPerBlock + warp_index() * kKmeansTokensPerWarp;
  unsigned long long* picks = a.pick + batch_idx * a.num_clusters;
  const float* term = a.term + batch_idx * a.num_tokens;
  float* distance = a.distance + batch_idx * a.num_tokens;
  const int64_t last = step > 0 ? kmeans_token(picks[step - 1]) : -1;
  const int64_t end = min(begin + kKmeansTokensPerWarp, a.num_tokens);
  unsigned long long highest = 0;
  for (int64_t i = begin; i < end; ++i) {  // the same in the whole warp
    float nearest = distance[i];
    __syncwarp();  // all lanes have read it
    if (last == i) {
      nearest = kKmeansPicked;
    } else if (last >= 0 && nearest != kKmeansPicked) {
      const float sum = warp_row_sum(token_row<T>(a, batch_idx, i), token_row<T>(a, batch_idx, last), a.dim, a.cosine);
      const float to = kmeans_distance(a.cosine, sum, term[i], term[last]);
      nearest = to < nearest ? to : nearest;
    }
    if (lane_index() == 0) distance[i] = nearest;
    const unsigned long long here = kmeans_pack(kmeans_start_key(a, step, i, term[i], nearest), i);
    highest = here > highest ? here : highest;
  }
  if (lane_index() == 0 && highest > 0) atomicMax(picks + step, highest);
}

// grid: batch_size * num_clusters. Copies the starts.
template <typename T>
__global__ void __launch_bounds__(kKmeansThreads) kmeans_gather_kernel(const ClusterKmeansArgs a) {
  const int64_t batch_idx = blockIdx.x / a.num_clusters, j = blockIdx.x % a.num_clusters;
  T* to = static_cast<T*>(a.centroids) + static_cast<int64_t>(blockIdx.x) * a.dim;
  const int64_t token = a.init == KmeansInit::kGiven ? 0 : kmeans_start(a.pick + batch_idx * a.num_clusters, j);
  const T* from = a.init == KmeansInit::kGiven
                      ? static_cast<const T*>(a.starts) + static_cast<int64_t>(blockIdx.x) * a.dim
                      : token_row<T>(a, batch_idx, token < 0 ? 0 : token);
  for (int64_t c = threadIdx.x; c < a.dim; c += kKmeansThreads) to[c] = token >= 0 ? from[c] : T(0.f);
}

// grid: batch_size * blocks of kKmeansPrepareRows centroids. all: rows that have converged, too; so below.
template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kTileThreads) kmeans_terms_kernel(const ClusterKmeansArgs a, bool all) {
  TOKRED_SHARED(StepTile<kTileThreads>, shared);
  const int64_t blocks = ceil_div<int64_t>(a.num_clusters, kKmeansPrepareRows), batch_idx = blockIdx.x / blocks;
  if (!all && a.done[batch_idx]) return;  // the whole block
  const int first = static_cast<int>(blockIdx.x % blocks) * kKmeansPrepareRows;
  static_assert(kKmeansPrepareRows == kTileThreads, "one centroid each");
  if (first + threadIdx.x < a.num_clusters) {
    const int64_t j = batch_idx * a.num_clusters + first + threadIdx.x;
    a.pick[j] = 0;
    a.num_members[j] = 0;
  }
  block_cluster_squares<T, kVectorLoads>(
      shared, centroids_of<T>(a, batch_idx), first, a.dim, [&](int row, float square) {
        a.centroid_term[batch_idx * a.num_clusters + row] = kmeans_term(a.cosine, square, false);
      });
}

// grid: batch_size * row_blocks * splits, the splits of one block side by side: they read the same rows.
template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kTileThreads, 2)
    kmeans_assign_kernel(const ClusterKmeansArgs a, int64_t row_blocks, int num_splits, bool all) {
  TOKRED_SHARED(ClusterTileStorage, shared);
  const int split = static_cast<int>(blockIdx.x) % num_splits;
  const int64_t block = blockIdx.x / static_cast<unsigned>(num_splits), batch_idx = block / row_blocks;
  if (!all && a.done[batch_idx]) return;  // the whole block
  const int row_begin = static_cast<int>(block % row_blocks) * kClusterBlockRows;
  const int num_tiles = static_cast<int>(ceil_div<int64_t>(a.num_clusters, kClusterBlockCols));
  const float* col_term = a.centroid_term + batch_idx * a.num_clusters;
  const float* row_terms = a.term + batch_idx * a.num_tokens;
  float best[4];
  int centroid[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    best[r] = -__uint_as_float(0x7f800000u);
    centroid[r] = -1;
  }
  block_for_cluster_pairs<T, kVectorLoads>(
      shared, tokens_of<T>(a, batch_idx), row_begin, centroids_of<T>(a, batch_idx), num_tiles * split / num_splits,
      num_tiles * (split + 1) / num_splits, a.dim, [&](int row) { return row_terms[row]; },
      [&](int col) { return col_term[col]; },
      [&](int r, int, int col, float product, float row, float column) {
        const float similarity = kmeans_similarity(a.cosine, product, row, column);
        if (similarity > best[r]) {  // columns ascend: ties stay with the lowest
          best[r] = similarity;
          centroid[r] = col;
        }
      });
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    unsigned long long packed = ~0ull;
    if (centroid[r] >= 0) {
      packed = static_cast<unsigned long long>(~score_key(best[r])) << 32 | static_cast<unsigned>(centroid[r]);
    }
    packed = warp_reduce<4>(packed, Min());
    const int row = thread_cluster_row(row_begin, r);
    if (lane_index() % 4 == 0 && row < a.num_tokens && packed != ~0ull) {
      atomicMin(a.nearest + batch_idx * a.num_tokens + row, packed);
    }
  }
}

// grid: batch_size * blocks of kKmeansThreads tokens, one thread each. all: counts members, too.
__global__ void __launch_bounds__(kKmeansThreads) kmeans_label_kernel(const ClusterKmeansArgs a, bool all) {
  const int64_t blocks = ceil_div<int64_t>(a.num_tokens, kKmeansThreads), batch_idx = blockIdx.x / blocks;
  const int64_t in_row = static_cast<int64_t>(blockIdx.x) % blocks * kKmeansThreads + threadIdx.x;
  if (in_row >= a.num_tokens || (!all && a.done[batch_idx])) return;
  const int64_t token = batch_idx * a.num_tokens + in_row;
  const unsigned long long nearest = a.nearest[token];
  const int64_t j = nearest == ~0ull ? -1 : static_cast<int64_t>(nearest & 0xffffffffu);
  a.dst_idx[token] = j;
  a.nearest[token] = ~0ull;  // for the next pass
  if (all && j >= 0) atomicAdd(a.num_members + batch_idx * a.num_clusters + j, 1);
}

// grid: as kmeans_start_kernel. The member most similar to each mean.
template <typename T>
__global__ void __launch_bounds__(kKmeansThreads) kmeans_medoid_kernel(const ClusterKmeansArgs a) {
  const int64_t blocks = ceil_div<int64_t>(a.num_tokens, kKmeansTokensPerBlock), batch_idx = blockIdx.x / blocks;
  if (a.done[batch_idx]) return;  // the whole block
  const int64_t begin =
      static_cast<int64_t>(blockIdx.x) % blocks * kKmeansTokensPerBlock + warp_index() * kKmeansTokensPerWarp;
  const int64_t end = min(begin + kKmeansTokensPerWarp, a.num_tokens);
  for (int64_t i = begin; i < end; ++i) {  // the same in the whole warp
    const int64_t token = batch_idx * a.num_tokens + i, j = a.dst_idx[token];
    if (j < 0) continue;
    const int64_t cluster = batch_idx * a.num_clusters + j;
    const T* mean = static_cast<const T*>(a.mean) + cluster * a.dim;
    const float sum = warp_row_sum(token_row<T>(a, batch_idx, i), mean, a.dim, a.cosine);
    if (lane_index() == 0) atomicMax(a.pick + cluster, kmeans_pack(kmeans_medoid_key(a, sum, a.term[token]), i));
  }
}

struct MoveStorage {
  BlockScratch block;
};

// grid: batch_size * num_clusters. An empty cluster stays where it is.
template <typename T>
__global__ void __launch_bounds__(kKmeansThreads) kmeans_move_kernel(const ClusterKmeansArgs a) {
  TOKRED_SHARED(MoveStorage, shared);
  const int64_t cluster = blockIdx.x, batch_idx = cluster / a.num_clusters;
  if (a.done[batch_idx]) return;  // the whole block
  float moved = 0.f;
  if (a.mean_size[cluster] > 0.f) {
    T* centroid = static_cast<T*>(a.centroids) + cluster * a.dim;
    const T* to = a.medoid ? token_row<T>(a, batch_idx, kmeans_token(a.pick[cluster]))
                           : static_cast<const T*>(a.mean) + cluster * a.dim;
    for (int64_t c = threadIdx.x; c < a.dim; c += kKmeansThreads) {
      const float step = static_cast<float>(to[c]) - static_cast<float>(centroid[c]);
      moved += step * step;
      centroid[c] = to[c];
    }
  }
  moved = block_sum(moved, shared.block);
  if (threadIdx.x == 0) a.moved[cluster] = moved;
}

// grid: batch_size.
__global__ void __launch_bounds__(kKmeansThreads) kmeans_converge_kernel(const ClusterKmeansArgs a) {
  TOKRED_SHARED(MoveStorage, shared);
  const int64_t batch_idx = blockIdx.x;
  if (a.done[batch_idx]) return;  // the whole block
  float moved = 0.f;
  for (int64_t j = threadIdx.x; j < a.num_clusters; j += kKmeansThreads)
    moved += a.moved[batch_idx * a.num_clusters + j];
  moved = block_sum(moved, shared.block);  // its barriers also order the flag's readers before its writer
  if (threadIdx.x != 0) return;
  ++a.num_iter[batch_idx];
  a.done[batch_idx] = sqrtf(moved) <= a.tol;
}

// Launches one after the other until one fails.
class Launches {
 public:
  explicit Launches(CUstream_st* stream) : stream_(stream) {}
  template <typename Kernel, typename... Args>
  void operator()(Kernel kernel, int64_t grid, int block, size_t shared_bytes, const Args&... args) {
    if (error_ != cudaSuccess) return;
    error_ = grid > INT32_MAX ? static_cast<int>(cudaErrorInvalidValue)
                              : launch(kernel, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(block)),
                                       shared_bytes, stream_, args...);
  }
  void merge(const ClusterKmeansArgs& a) {
    if (error_ == cudaSuccess) error_ = segment_merge_cuda(a.merging(), stream_);
  }
  int error() const { return error_; }

 private:
  CUstream_st* stream_;
  int error_ = cudaSuccess;
};

template <typename T, bool kVectorLoads>
int run(const ClusterKmeansArgs& a, const ClusterKmeansPolicy& policy, CUstream_st* stream) {
  Launches run(stream);
  const auto by_tokens = [&](int64_t per_block) { return a.batch_size * ceil_div(a.num_tokens, per_block); };
  const int64_t clusters = a.batch_size * a.num_clusters;
  const int64_t pairs = a.batch_size * policy.row_blocks * policy.splits;
  run(kmeans_clear_kernel, a.batch_size, kKmeansThreads, 0, a);
  run(kmeans_prepare_kernel<T, kVectorLoads>, by_tokens(kKmeansPrepareRows), kTileThreads,
      sizeof(StepTile<kTileThreads>), a);
  for (int64_t step = 0; step < a.num_clusters && a.init != KmeansInit::kGiven; ++step) {
    run(kmeans_start_kernel<T>, by_tokens(kKmeansTokensPerBlock), kKmeansThreads, 0, a, step);
  }
  run(kmeans_gather_kernel<T>, clusters, kKmeansThreads, 0, a);
  for (int64_t i = 0; i <= a.max_iter; ++i) {
    const bool all = i == a.max_iter;
    run(kmeans_terms_kernel<T, kVectorLoads>, a.batch_size * ceil_div<int64_t>(a.num_clusters, kKmeansPrepareRows),
        kTileThreads, sizeof(StepTile<kTileThreads>), a, all);
    run(kmeans_assign_kernel<T, kVectorLoads>, pairs, kTileThreads, sizeof(ClusterTileStorage), a, policy.row_blocks,
        policy.splits, all);
    run(kmeans_label_kernel, by_tokens(kKmeansThreads), kKmeansThreads, 0, a, all);
    if (all) break;
    run.merge(a);
    if (a.medoid) run(kmeans_medoid_kernel<T>, by_tokens(kKmeansTokensPerBlock), kKmeansThreads, 0, a);
    run(kmeans_move_kernel<T>, clusters, kKmeansThreads, sizeof(MoveStorage), a);
    run(kmeans_converge_kernel, a.batch_size, kKmeansThreads, sizeof(MoveStorage), a);
  }
  return run.error();
}

}  // namespace

int cluster_kmeans_cuda(const ClusterKmeansArgs& args, CUstream_st* stream) {
  const ClusterKmeansPolicy policy =
      choose_policy(args, reinterpret_cast<uint64_t>(args.x), reinterpret_cast<uint64_t>(args.centroids));
  int error = cudaErrorInvalidValue;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    error = policy.vector_loads ? run<T, true>(args, policy, stream) : run<T, false>(args, policy, stream);
  });
  return error;
}

}  // namespace tokred
