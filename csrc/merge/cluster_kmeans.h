// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Lloyd's iterations: each token to the nearest centroid, each centroid to the mean of its tokens (or the token nearest
// to that). Similarities are what is compared: minus the squared distance, or the cosine. A token with a NaN or an
// infinity has none, and belongs to no cluster.
#pragma once
#include "common/fixed_point.h"
#include "merge/cluster_tiles.h"
#include "merge/segment_merge.h"

namespace tokred {

enum class KmeansInit : int8_t { kKkz, kPlusPlus, kGiven };

struct ClusterKmeansArgs {
  const void* x;             // [batch_size, num_tokens, dim], last dim contiguous
  const uint8_t* drop_mask;  // [batch_size, num_tokens], contiguous, 0 or 1; null: none is excluded
  const void* starts;        // [batch_size, num_clusters, dim], contiguous, for kGiven
  void* centroids;           // [batch_size, num_clusters, dim]
  int64_t* dst_idx;          // [batch_size, num_tokens], -1: no cluster
  int32_t* num_members;      // [batch_size, num_clusters]
  int32_t* num_iter;         // [batch_size]
  int64_t batch_size, num_tokens, dim, num_clusters, max_iter;
  int64_t stride_batch, stride_token;  // of x, in elements
  uint64_t seed;
  float tol;
  KmeansInit init;
  bool cosine, medoid;
  DType dtype;  // of x, starts and centroids
  // Scratch:
  float* term;                  // [batch_size, num_tokens], what similarities are made of; NaN where a token has none
  float* centroid_term;         // [batch_size, num_clusters], likewise
  float* distance;              // [batch_size, num_tokens], to the nearest start
  void* mean;                   // [batch_size, num_clusters, dim]
  float* mean_size;             // [batch_size, num_clusters]
  int32_t* offsets;             // [batch_size, num_clusters + 1]
  int32_t* order;               // [batch_size, num_tokens]
  int32_t* done;                // [batch_size]: converged
  unsigned long long* pick;     // [batch_size, num_clusters], (key, complement of the token)
  unsigned long long* nearest;  // CUDA: [batch_size, num_tokens], (complement of the key, centroid)
  float* moved;                 // CUDA: [batch_size, num_clusters], squared

  SegmentMergeArgs merging() const {
    SegmentMergeArgs m{};
    m.x = x;
    m.dst_idx = {dst_idx, true};
    m.merged = mean;
    m.size_out = mean_size;
    m.offsets = offsets;
    m.order = order;
    m.skip = done;
    m.batch_size = batch_size;
    m.num_tokens = num_tokens;
    m.num_out = num_clusters;
    m.dim = dim;
    m.stride_batch = stride_batch;
    m.stride_token = stride_token;
    m.dtype = dtype;
    m.mode = MergeMode::kMean;
    return m;
  }
};

constexpr float kKmeansEps = 1e-12f;  // smallest norm that is divided by

// A row's part in its similarities: the squared norm, or 1 / norm for cosines; NaN where it takes no part.
TOKRED_HOST_DEVICE float kmeans_term(bool cosine, float square, bool dropped) {
  if (dropped || !(square < __builtin_inff())) return __builtin_nanf("");
  if (!cosine) return square;
  const float norm = sqrtf(square);
  return 1.f / (norm < kKmeansEps ? kKmeansEps : norm);
}
TOKRED_HOST_DEVICE float kmeans_similarity(bool cosine, float product, float a, float b) {
  if (cosine) return product * (a * b);
  const float negative = 2.f * product - (a + b);
  return negative > 0.f ? 0.f : negative;  // NaN stays
}
// Distance of a token to a start that has just been chosen. sum: of squared differences, or of products for cosines.
TOKRED_HOST_DEVICE float kmeans_distance(bool cosine, float sum, float a, float b) {
  const float distance = cosine ? 1.f - sum * (a * b) : sum + 0.f * (a + b);
  return distance < 0.f ? 0.f : distance;
}

constexpr float kKmeansPicked = -1.f;  // distance of a token that is a start

// The key of a token in the choice of start number step; the largest, of the lowest token, is chosen.
TOKRED_HOST_DEVICE uint32_t kmeans_start_key(const ClusterKmeansArgs& a, int64_t step, int64_t token, float term,
                                             float distance) {
  if (!(term == term) || distance == kKmeansPicked) return kKeyExcluded;
  float value = step > 0 ? distance : a.cosine ? 1.f / term : term;  // the first: the longest
  if (a.init == KmeansInit::kPlusPlus) {
    value = (step > 0 ? distance : 1.f) / static_cast<float>(exponential_noise(a.seed, step, token));
  }
  const uint32_t key = score_key(value);
  return key > kKeyNaN ? key : kKeyNaN;
}
TOKRED_HOST_DEVICE unsigned long long kmeans_pack(uint32_t key, int64_t token) {
  return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
// The token of a pick; -1: none.
TOKRED_HOST_DEVICE int64_t kmeans_token(unsigned long long pick) {
  if (pick >> 32 == kKeyExcluded) return -1;
  return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(pick & 0xffffffffu));
}
// The token that start number step copies: where fewer tokens than clusters have values, the first start again.
TOKRED_HOST_DEVICE int64_t kmeans_start(const unsigned long long* picks, int64_t step) {
  const int64_t token = kmeans_token(picks[step]);
  return token >= 0 ? token : kmeans_token(picks[0]);
}

// The key of a member as its cluster's medoid. sum: as in kmeans_distance, with the mean.
TOKRED_HOST_DEVICE uint32_t kmeans_medoid_key(const ClusterKmeansArgs& a, float sum, float term) {
  const uint32_t key = score_key(a.cosine ? sum * term : -sum);
  return key > kKeyNaN ? key : kKeyNaN;
}

constexpr int kKmeansThreads = 256, kKmeansTokensPerWarp = 8;
constexpr int kKmeansPrepareRows = 128;
constexpr int64_t kKmeansTokensPerBlock = int64_t{kKmeansThreads} / 32 * kKmeansTokensPerWarp;

struct ClusterKmeansPolicy {
  bool vector_loads;   // of tokens and centroids, 16 bytes at a time; else one value
  int splits;          // shares of the centroids, one block each; no bit of the result depends on it
  int64_t row_blocks;  // of a batch row
};
constexpr ClusterKmeansPolicy choose_policy(const ClusterKmeansArgs& a, uint64_t address, uint64_t centroids) {
  const int64_t blocks = ceil_div(a.num_tokens, int64_t{kClusterBlockRows});
  return {rows_are_aligned(address | centroids, a.dtype, a.dim, a.stride_token, a.batch_size, a.stride_batch),
          cluster_splits(a.batch_size * blocks, a.num_clusters), blocks};
}

void cluster_kmeans_cpu(const ClusterKmeansArgs& args);
int cluster_kmeans_cuda(const ClusterKmeansArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
