// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Density peaks: the density of a token follows from its k nearest ones, its score from that and from how far the
// nearest denser token is. Distances are squared and undivided inside; densities and scores are logarithms, so that
// nothing underflows. A token with a NaN or an infinity has no distance to anything (NaN).
#pragma once
#include <cmath>

#include "common/dispatch.h"
#include "common/fixed_point.h"
#include "common/ragged.h"
#include "merge/cluster_tiles.h"

namespace tokred {

struct ClusterDpcArgs {
  const void* x;              // [batch_size, num_tokens, dim] or, packed, [num_tokens, dim]; last dim contiguous
  const uint8_t* drop_mask;   // [batch_size, num_tokens] or [num_tokens], contiguous, 0 or 1; null: none is excluded
  const int32_t* cu_seqlens;  // [batch_size + 1]; null: dense
  int64_t* centre_idx;        // [batch_size, num_clusters], -1 past num_centres
  int64_t* dst_idx;           // as drop_mask; -1: excluded
  int32_t* num_centres;       // [batch_size]
  float* score;               // as drop_mask, -inf where excluded
  float* log_density;         // likewise
  int64_t batch_size;
  int64_t num_tokens;  // of a sequence when dense, of all sequences when packed
  int64_t max_seqlen;  // longest sequence that is looked at; num_tokens when dense
  int64_t dim, num_clusters, k;
  int64_t stride_batch, stride_token;  // of x, in elements
  uint64_t seed;
  float noise;
  bool by_score;  // order of centre_idx: by falling score, else ascending
  DType dtype;
  // CUDA only, scratch; [tokens] as drop_mask, [sequence tokens] counted from a sequence's first token:
  float* square;                // [tokens], squared norms; NaN where a token takes no part
  float* partial;               // [2 * splits, tokens, kept], squared distances, ascending, then inf
  uint32_t* farthest;           // [batch_size], bits of the largest squared distance
  uint32_t* denser;             // [tokens], bits of the squared distance to the nearest denser token
  unsigned long long* nearest;  // [tokens], (bits of the squared distance, place) of the nearest centre
  int32_t* order;               // [sequence tokens], by falling density
  int32_t* slot;                // [tokens], a centre's cluster; else -1
  int32_t* centre;              // [sequence tokens], the centres, ascending: places
  int32_t* cluster;             // [sequence tokens], of a place
};

constexpr int64_t kDpcMaxNeighbours = 16;  // a CUDA thread keeps lists of four tokens in registers

// The tokens of one sequence, and the place of its first one in outputs.
struct DpcSpan {
  int64_t begin, len, first;
};
TOKRED_HOST_DEVICE DpcSpan dpc_span(const ClusterDpcArgs& a, int64_t batch_idx) {
  const TokenSpan span = token_span(a.cu_seqlens, a.num_tokens, a.max_seqlen, batch_idx);
  return {span.begin, span.len, a.cu_seqlens ? span.begin : batch_idx * a.num_tokens};
}

// Squared norms that distances may be made of.
TOKRED_HOST_DEVICE float dpc_square(float square) { return square < __builtin_inff() ? square : __builtin_nanf(""); }

// Minus the mean squared distance, per channel, to the count nearest tokens, given the distances' sum.
TOKRED_HOST_DEVICE float dpc_log_density(const ClusterDpcArgs& a, float sum, int count, float square, int64_t token) {
  if (!(square == square)) return square;
  const float log_density = 0.f - sum / static_cast<float>(count) / static_cast<float>(a.dim > 0 ? a.dim : 1);
  if (a.noise == 0.f) return log_density;
  return logf(expf(log_density) + a.noise * uniform_noise(a.seed, 0, token));
}

// Log of density times distance, of the squared distance to the nearest denser token.
TOKRED_HOST_DEVICE float dpc_score(const ClusterDpcArgs& a, float log_density, float distance) {
  return log_density + 0.5f * logf(distance / static_cast<float>(a.dim > 0 ? a.dim : 1));
}

constexpr int kDpcPrepareRows = 128;
// Blocks of a sequence; one where no token is looked at, which marks them all.
TOKRED_HOST_DEVICE constexpr int64_t dpc_prepare_blocks(const ClusterDpcArgs& a) {
  return ceil_div(a.max_seqlen > 0 ? a.max_seqlen : int64_t{1}, int64_t{kDpcPrepareRows});
}
constexpr int kDpcRankThreads = 256, kDpcRankLanes = 8;  // lanes that share a token's comparisons
constexpr int kDpcTokenThreads = 128;                    // one token each
constexpr int kDpcCentreThreads = 1024;

struct ClusterDpcPolicy {
  bool vector_loads;  // 16 bytes at a time; else one value
  int kept;           // nearest distances that a thread keeps of each token: 8 or 16
  // Shares of the columns, one block each; no bit of the result depends on them.
  int splits, centre_splits;  // of all tokens, of the centres
  int64_t row_blocks;         // of a sequence
};
constexpr ClusterDpcPolicy choose_policy(const ClusterDpcArgs& a, uint64_t address) {
  const int64_t blocks = ceil_div(a.max_seqlen, int64_t{kClusterBlockRows});
  const int splits = cluster_splits(a.batch_size * blocks, a.max_seqlen);
  return {rows_are_aligned(address, a.dtype, a.dim, a.stride_token, a.batch_size, a.stride_batch), a.k <= 8 ? 8 : 16,
          splits, cluster_splits(a.batch_size * blocks, a.num_clusters), blocks};
}

void cluster_dpc_knn_cpu(const ClusterDpcArgs& args);
int cluster_dpc_knn_cuda(const ClusterDpcArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
