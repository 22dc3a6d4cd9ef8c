// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Sums of attention along diagonals, the keys that lie equally far before their queries: a third pass of the same
// product.
//
// A block owns a band of diagonals and walks down it: a tile of queries, and the keys that are as far before them as
// the band says, both one tile further in each step. So every diagonal is one block's, there is no buffer between
// blocks, and the order of additions is fixed. The corners of a step's rectangle that lie outside of the band are
// computed in vain: a quarter of it for 16-bit types. A warp turns its chunk of weights by way of shared memory: each
// lane adds up two diagonals of the chunk, together as many weights as a lane has. The sums of all chunks of a step are
// then added by the threads that own the diagonals.
#include "score/attn_received_weights.cuh"

namespace tokred {
namespace {

template <typename T, int kDim>
struct DiagonalConfig : AttnConfig<T, kDim> {
  using C = AttnConfig<T, kDim>;
  static constexpr int kWarps =
      C::kIsFloat ? kDim > 128 ? 3 : 4 : 8;  // float32: shared memory for the rows of that many
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kChunks = C::kTile / C::kChunk;                    // of a warp and step
  static constexpr int kLength = C::kRowsPerWarp + C::kChunk - 1;         // diagonals that a chunk touches
  static constexpr int kBand = kWarps * C::kRowsPerWarp - C::kTile;       // of a block
  static constexpr int kBlocksPerSm = C::kIsFloat && kDim > 128 ? 1 : 2;  // shared memory for that many
};

template <typename T, int kDim>
struct DiagonalStorage {
  using D = DiagonalConfig<T, kDim>;
  AttnStorage<T, kDim, D::kWarps * D::kRowsPerWarp> rows;
  float weight[D::kWarps][D::kRowsPerWarp][D::kChunk + 1];  // of a warp's chunk, [key][query]
  float part[D::kWarps][D::kChunks][D::kLength];
};

// The sums of the step for diagonal number u of the band, in the order of queries. Chunk c of warp w has it at place
// u - at(c, w), if that is one of its places.
template <typename T, int kDim>
__device__ inline float fold_parts(const DiagonalStorage<T, kDim>& shared, int u, int num_chunks) {
  using D = DiagonalConfig<T, kDim>;
  float sum = 0.f;
  for (int c = 0; c < num_chunks; ++c) {
    const int place = u - D::kBand + D::kRowsPerWarp - c * D::kChunk;  // in the chunk of warp 0; one further is
    for (int w = max(ceil_div(-place, D::kRowsPerWarp), 0); w < D::kWarps; ++w) {  // kRowsPerWarp on
      const int at = place + w * D::kRowsPerWarp;
      if (at >= D::kLength) break;
      sum += shared.part[w][c][at];
    }
  }
  return sum;
}

// grid: batch_size * num_kv_heads * bands. The tail of the shared memory holds the sums, [group, kBand].
template <typename T, int kDim>
__global__ void __launch_bounds__(DiagonalConfig<T, kDim>::kThreads, DiagonalConfig<T, kDim>::kBlocksPerSm)
    attn_diagonal_kernel(const AttnReceivedArgs args, int bands, bool aligned) {
  using D = DiagonalConfig<T, kDim>;
  using S = DiagonalStorage<T, kDim>;
  TOKRED_SHARED(S, shared);
  TOKRED_SHARED_TAIL(S, tail);
  float* sums = reinterpret_cast<float*>(tail);
  const unsigned head_idx = blockIdx.x / static_cast<unsigned>(bands),
                 num_kv_heads = static_cast<unsigned>(args.num_kv_heads);
  const int kv_head = static_cast<int>(head_idx % num_kv_heads), group = static_cast<int>(args.group());
  const AttnSequence s = args.sequence(head_idx / num_kv_heads);
  const int head_dim = static_cast<int>(args.head_dim), thread = thread_rank();
  const int first = static_cast<int>(blockIdx.x % static_cast<unsigned>(bands)) * D::kBand;  // diagonal
  const int start = s.kv_len - s.q_len;
  // The queries that have a key at these distances, in whole tiles from the first query on.
  const int q_begin = min(max(first - start, 0), s.q_len) / D::kTile * D::kTile;
  const int num_steps = first > args.back ? 0 : ceil_div(s.q_len - q_begin, D::kTile), num_tiles = num_steps * group;
  for (int u = thread; u < D::kBand; u += D::kThreads) {
    for (int h = 0; h < group; ++h) sums[h * D::kBand + u] = 0.f;
  }
  const auto issue = [&](int i) {
    block_load_queries(shared.rows, i % D::kStages, args, s, kv_head * group + i % group,
                       q_begin + i / group * D::kTile, s.q_len, aligned);
  };
  if (num_tiles > 0) issue(0);
  cp_async_commit();
  OwnRows<T, kDim> own;
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;
  float* own_bias = shared.rows.queries.own_bias + warp * D::kRowsPerWarp;
  for (int i = 0; i < num_tiles; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // tile i is there, tile i - 1 is read by all, and its parts are added
    if (i + 1 < num_tiles) issue(i + 1);
    cp_async_commit();
    const int stage = i % D::kStages, tile_q = q_begin + i / group * D::kTile;
    // The first key of the block is the one furthest before the tile's first query.
    const int key0 = start + tile_q - first - D::kBand + 1 + warp * D::kRowsPerWarp;
    const int last_key = key0 + D::kRowsPerWarp - 1;
    if (i % group == 0) {
      const auto exists = [&](int key) { return key >= 0 && key < s.kv_len; };
      own.load(
          shared.rows,
          [&](int r) -> const T* {
            return exists(key0 + r) ? keys_of_head<T>(args, s, kv_head) + args.key_row(s, key0 + r) : nullptr;
          },
          head_dim, aligned);
      if (args.key_bias && lane < D::kRowsPerWarp) {
        const float* bias = args.key_bias + s.batch * args.bias_batch + kv_head * args.bias_head;
        own_bias[lane] = exists(key0 + lane) ? bias[key0 + lane] : 0.f;
      }
      __syncwarp();  // the warp's rows and biases are there
    }
    const int num_chunks = min(ceil_div(s.q_len - tile_q, D::kChunk), D::kChunks);
    for (int c = 0; c < num_chunks; ++c) {
      // The first of the chunk's diagonals; those outside of the band are never added.
      const int from = D::kBand - D::kRowsPerWarp + c * D::kChunk - warp * D::kRowsPerWarp;
      if (from >= D::kBand || from + D::kLength <= 0) continue;  // the whole warp
      float acc[D::kRowTiles][D::kColTiles][4];
      warp_multiply<T, kDim>(acc, own, shared.rows.tile[stage] + c * D::kChunk);
      if (args.adjusted()) {
        thread_adjust(acc, args.scale, args.softcap, args.key_bias ? own_bias + g : nullptr,
                      [](int r, int) { return 8 * r; });
      }
      const int q0 = tile_q + c * D::kChunk, last_q = q0 + D::kChunk - 1;
      const bool masked = last_q >= s.q_len || key0 < 0 || last_key >= s.kv_len || q0 + s.band.end <= last_key ||
                          last_q + s.band.first > key0;
      const auto& queries = shared.rows.queries;
      thread_weigh<D::kRowTiles>(acc, &queries.lse[stage][c * D::kChunk], &queries.weight[stage][c * D::kChunk],
                                 args.q_weight != nullptr, args.exponent_scale, masked, key0,
                                 &queries.sees[stage][c * D::kChunk]);
      float (*weight)[D::kChunk + 1] = shared.weight[warp];
      __syncwarp();  // the chunk before is read
#pragma unroll
      for (int r = 0; r < 2 * D::kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2 * D::kColTiles; ++i) {
          weight[8 * r + g][8 * (i / 2) + 2 * t + i % 2] = acc[r / 2][i / 2][2 * (r % 2) + i % 2];
        }
      }
      __syncwarp();  // this one is there
      for (int at = lane; at < D::kLength; at += kWarpSize) {
        const int shift = at - D::kRowsPerWarp + 1;  // query minus key
        float sum = 0.f;
        for (int key = max(-shift, 0); key < min(D::kRowsPerWarp, D::kChunk - shift); ++key)
          sum += weight[key][key + shift];
        shared.part[warp][c][at] = sum;
      }
    }
    __syncthreads();  // the parts of all warps are there
    for (int u = thread; u < D::kBand; u += D::kThreads) {
      sums[i % group * D::kBand + u] += fold_parts(shared, u, num_chunks);
    }
  }
  for (int u = thread; u < D::kBand && first + u < s.kv_len; u += D::kThreads) {
    for (int h = 0; h < group; ++h) {
      const int64_t head = s.batch * args.num_q_heads + kv_head * group + h;
      args.diagonal[head * args.kv_len + first + u] = sums[h * D::kBand + u];
    }
  }
}

template <typename T, int kDim>
int launch_diagonal(const AttnReceivedArgs& a, CUstream_st* stream) {
  using D = DiagonalConfig<T, kDim>;
  const AttnDiagonalPolicy policy = choose_attn_diagonal_policy(a.head_dim, a.dtype);
  if (policy.diagonals != D::kBand || policy.warps != D::kWarps) return cudaErrorInvalidValue;
  const int bands = static_cast<int>(ceil_div<int64_t>(a.kv_len, D::kBand));
  const size_t sums = static_cast<size_t>(a.group() * D::kBand) * sizeof(float);
  return launch(attn_diagonal_kernel<T, kDim>, dim3(static_cast<unsigned>(a.batch_size * a.num_kv_heads * bands)),
                dim3(D::kThreads), shared_bytes_with_tail<DiagonalStorage<T, kDim>>(sums), stream, a, bands,
                has_aligned_rows<T>(a));
}

}  // namespace

int attn_received_diagonal_cuda(const AttnReceivedArgs& args, CUstream_st* stream) {
  int error = cudaErrorInvalidValue;
  dispatch_rows(args, [&](auto tag, auto padded) {
    error = launch_diagonal<typename decltype(tag)::type, decltype(padded)::value>(args, stream);
  });
  return error;
}

}  // namespace tokred
