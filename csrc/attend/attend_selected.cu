// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A block takes one split of one list for up to 16 query rows, the group that shares a kv head. Floor: the listed rows
// of K and V read once, and the lists; the tensor cores have time to spare, so half-empty tiles of query rows cost
// nothing. Each warp walks tiles of its own (kKeys list entries, K and V) through a ring of two stages: no block-wide
// barrier between the first row and the last, and 8 KiB under way per warp. Warps merge through shared memory, splits
// through a second kernel, both in a fixed order.
#include "attend/attend_selected.h"
#include "common/block.cuh"
#include "common/constants.h"
#include "common/cp_async.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"

namespace tokred {
namespace {

constexpr float kMinusInf = -__builtin_huge_valf();
constexpr int kRows = static_cast<int>(kAttendTileRows);
constexpr int kMergeThreads = 128;
// Columns that are computed at a time, and so must be there: one step of the mma for K; for V, whose columns are
// unrolled, several to a branch, so that their loads overlap.
constexpr int kPadK = 16, kPadV = 64;

template <typename T, int kDim>
struct Tile {
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int kWarps = attend_selected_warps(kDim);
  static constexpr int kKeys = kIsFloat ? 8 : 16;  // what one mma takes as its k
  static constexpr int kStages = 2;
  static constexpr int kBlocksPerSm = kDim <= 128 ? 3 : 2;  // registers for that many
  static constexpr int kChunk = 16 / sizeof(T);             // elements of one copy
  static constexpr int kRow = kDim + kChunk;  // an odd number of 16-byte units: ldmatrix meets every bank once
  using Rows = T[kKeys][kRow];
};

template <typename T, int kDim>
struct Storage {
  using K = Tile<T, kDim>;
  T q[kRows][K::kRow];
  typename K::Rows ring[K::kWarps][K::kStages][2];  // K, V; in the end float [kWarps][kRows][kDim + 4]
  float m[K::kWarps][kRows], l[K::kWarps][kRows];
  int32_t slot[kAttendMaxSplit];
  static_assert(sizeof(ring) >= K::kWarps * kRows * (kDim + 4) * sizeof(float), "room for the warps' outputs");
};

struct Launch {
  AttendSelectedPolicy policy;
  float scale_log2;  // logits are in units of log2(e), so that exp is one instruction
  int bias_rows;     // rows of staged bias: heads in a tile where each has its own, else 1, else 0
  bool wide;         // every row is 16-byte aligned and a multiple of 16 bytes
};

// Where a block works. row0: the first of its query rows among those of the list.
struct Place {
  int64_t batch_idx, unit, split, first_head, kv_head, row0;
  int rows, entries;
};

__device__ inline Place locate(const AttendSelectedArgs& a, const Launch& launch) {
  const AttendSelectedPolicy& p = launch.policy;
  Place at;
  unsigned rest = blockIdx.x;
  const unsigned m_tiles = static_cast<unsigned>(p.m_tiles), splits = static_cast<unsigned>(p.num_splits);
  at.row0 = int64_t{rest % m_tiles} * kRows;  // tiles of one split side by side: the later ones find its rows in L2
  rest /= m_tiles;
  at.split = rest % splits;
  rest /= splits;
  at.unit = rest % static_cast<unsigned>(p.units);
  at.batch_idx = rest / static_cast<unsigned>(p.units);
  const int64_t group = attend_group(a);
  at.first_head = at.unit * group;
  at.kv_head = at.first_head / (a.num_q_heads / a.num_kv_heads);
  at.rows = static_cast<int>(min(group * a.q_len - at.row0, int64_t{kRows}));
  at.entries = static_cast<int>(min(a.num_listed - at.split * p.split, p.split));
  return at;
}

// Starts the copy of kKeys rows of K or V. Columns from dim to the next multiple of pad become zeros, as does a row
// without a slot.
template <typename T, int kDim>
__device__ inline void warp_copy_rows(typename Tile<T, kDim>::Rows& to, const KvTensor& x, const T* from,
                                      const int32_t* slot, int page_shift, bool wide, int pad) {
  using K = Tile<T, kDim>;
  const int dim = static_cast<int>(x.dim), padded = (dim + pad - 1) / pad * pad;
  if (wide) {
    constexpr int kChunks = kDim / K::kChunk, kCopies = K::kKeys * kChunks / kWarpSize;
    constexpr int kGroup = 4;  // enough copies to overlap; all of them at once would hold too many addresses
    static_assert(kCopies % kGroup == 0, "whole groups");
#pragma unroll 1
    for (int j = 0; j < kCopies; j += kGroup) {
      int32_t s[kGroup];
#pragma unroll
      for (int u = 0; u < kGroup; ++u) s[u] = slot[((j + u) * kWarpSize + lane_index()) / kChunks];
#pragma unroll
      for (int u = 0; u < kGroup; ++u) {
        const int i = (j + u) * kWarpSize + lane_index(), row = i / kChunks, c = i % kChunks * K::kChunk;
        // What is not valid is not read, so slot 0 does for its address: no branch.
        const T* source = from + x.slot_offset(max(s[u], 0), page_shift) + c;
        if (c < padded) cp_async_16(&to[row][c], source, s[u] >= 0 && c < dim);
      }
    }
    return;
  }
  for (int row = 0; row < K::kKeys; ++row) {
    const int32_t s = slot[row];
    const T* source = from + x.slot_offset(max(s, 0), page_shift);
    for (int c = lane_index(); c < padded; c += kWarpSize) to[row][c] = s >= 0 && c < dim ? source[c] : T(0.f);
  }
}

// score += q k^T of one tile, as accumulator fragments: score[n][j] belongs to key 8 n + 2 t + j % 2.
template <typename T, int kDim>
__device__ inline void warp_scores(const T (&q)[kRows][Tile<T, kDim>::kRow], const typename Tile<T, kDim>::Rows& k,
                                   int dim, float (&score)[Tile<T, kDim>::kKeys / 8][4]) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  if constexpr (Tile<T, kDim>::kIsFloat) {
#pragma unroll 4
    for (int c = 0; c < dim; c += 8) {
      const float a[4] = {q[g][c + t], q[g + 8][c + t], q[g][c + t + 4], q[g + 8][c + t + 4]};
      const float b[2] = {k[g][c + t], k[g][c + t + 4]};
      mma_m16n8k8_3xtf32(score[0], a, b);
    }
  } else {
#pragma unroll 4
    for (int c = 0; c < dim; c += 16) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, &q[lane % 16][c + 8 * (lane / 16)]);
      ldmatrix_x4(b, &k[lane % 8 + 8 * (lane / 16)][c + 8 * (lane / 8 % 2)]);
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
      mma_m16n8k16<T>(score[0], a, b0);
      mma_m16n8k16<T>(score[1], a, b1);
    }
  }
}

// acc += weight v of one tile; weight as warp_scores leaves it. Columns up to the next multiple of kPadV are zeros.
template <typename T, int kDim>
__device__ inline void warp_add_values(const float (&weight)[Tile<T, kDim>::kKeys / 8][4],
                                       const typename Tile<T, kDim>::Rows& v, int dim_v, float (&acc)[kDim / 8][4]) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  if constexpr (Tile<T, kDim>::kIsFloat) {
    // The k index of a product is free to name keys in any order: slot t is key 2 t and slot t + 4 is key 2 t + 1, as
    // the accumulators hold them.
    const float a[4] = {weight[0][0], weight[0][2], weight[0][1], weight[0][3]};
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if (n * 8 / kPadV * kPadV >= dim_v) break;
      const float b[2] = {v[2 * t][n * 8 + g], v[2 * t + 1][n * 8 + g]};
      mma_m16n8k8_3xtf32(acc[n], a, b);
    }
  } else {
    const uint32_t a[4] = {pack_pair<T>(weight[0][0], weight[0][1]), pack_pair<T>(weight[0][2], weight[0][3]),
                           pack_pair<T>(weight[1][0], weight[1][1]), pack_pair<T>(weight[1][2], weight[1][3])};
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      if (n * 16 / kPadV * kPadV >= dim_v) break;
      uint32_t b[4];
      ldmatrix_x4_trans(b, &v[lane % 16][n * 16 + 8 * (lane / 16)]);
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
      mma_m16n8k16<T>(acc[2 * n], a, b0);
      mma_m16n8k16<T>(acc[2 * n + 1], a, b1);
    }
  }
}

// The running softmax of a warp over its tiles. A lane holds rows g and g + 8 (halves 0 and 1).
template <int kDim>
struct State {
  float m[2] = {kMinusInf, kMinusInf};  // the same in the four lanes of a row
  float l[2] = {0.f, 0.f};              // of the lane's own keys
  float acc[kDim / 8][4] = {};
};

// Scores become weights e^(score - m) and what was summed before is rescaled to the new m.
template <int kDim, int kTiles>
__device__ inline void warp_softmax_step(float (&score)[kTiles][4], State<kDim>& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = kMinusInf;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) top = fmaxf(top, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
    top = fmaxf(state.m[half], warp_max<4>(top));
    const float shift = top == kMinusInf ? 0.f : top;  // -inf - -inf would be NaN
    const float before = fast_exp2(state.m[half] - shift);
    state.m[half] = top;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 2 * half; j < 2 * half + 2; ++j) sum += score[n][j] = fast_exp2(score[n][j] - shift);
    }
    state.l[half] = state.l[half] * before + sum;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      state.acc[n][2 * half] *= before;
      state.acc[n][2 * half + 1] *= before;
    }
  }
}

// Resolves the split's entries to slots, stages the bias and the query rows.
template <typename T, int kDim>
__device__ inline void block_prepare(const AttendSelectedArgs& a, const Launch& launch, const Place& at,
                                     Storage<T, kDim>& s, float* bias) {
  using K = Tile<T, kDim>;
  const int thread = thread_rank(), num_threads = K::kWarps * kWarpSize;
  const int64_t list_head = a.list_heads == 1 ? 0 : a.list_heads == a.num_q_heads ? at.first_head : at.kv_head;
  const int64_t list = (at.batch_idx * a.list_heads + list_head) * a.num_listed + at.split * launch.policy.split;
  const int64_t limit = kv_limit(a.kv_lens, a.kv_len, at.batch_idx);
  const int64_t first_bias_head = a.bias_heads == 1               ? 0
                                  : a.bias_heads == a.num_q_heads ? at.first_head + at.row0 / a.q_len
                                                                  : at.kv_head;
  const int padded = (at.entries + K::kKeys - 1) / K::kKeys * K::kKeys;
  for (int i = thread; i < padded; i += num_threads) {
    const int64_t position = i < at.entries ? a.kept_idx[list + i] : -1;
    const int32_t slot = attend_slot(a, at.batch_idx, position, limit);
    s.slot[i] = slot;
    for (int r = 0; r < launch.bias_rows; ++r) {
      // A tile may span fewer heads than bias_rows at the end of its group.
      const int64_t head = first_bias_head + r;
      const bool read = slot >= 0 && head < a.bias_heads;
      bias[r * launch.policy.split + i] =
          read ? a.key_bias[at.batch_idx * a.bias_batch + head * a.bias_head + position] * kLog2e : 0.f;
    }
  }
  const int dim = static_cast<int>(a.k.dim), columns = (dim + kPadK - 1) / kPadK * kPadK;
  const T* q = static_cast<const T*>(a.q) + at.batch_idx * a.q_batch;
  for (int r = warp_index(); r < kRows; r += K::kWarps) {
    const int64_t row = at.row0 + r, head = at.first_head + row / a.q_len;
    const T* from = q + head * a.q_head + row % a.q_len * a.q_token;
    for (int c = lane_index(); c < columns; c += kWarpSize) {
      s.q[r][c] = r < at.rows && c < dim ? from[c] : T(0.f);
    }
  }
  __syncthreads();  // slots, bias and q are there for all warps
}

template <typename T>
__device__ inline void write_lse(const AttendSelectedArgs& a, int64_t row, float m, float l) {
  a.lse[row] = l == 0.f ? kMinusInf : (m + fast_log2(l)) * kLn2;
}
template <typename T>
__device__ inline T* out_row(const AttendSelectedArgs& a, int64_t row) {
  const int64_t head = row / a.q_len;
  return static_cast<T*>(a.out) + head / a.num_q_heads * a.out_batch + head % a.num_q_heads * a.out_head +
         row % a.q_len * a.out_token;
}

// The warps' states become the block's: the result where there is one split, else a partial result.
template <typename T, int kDim>
__device__ inline void block_finish(const AttendSelectedArgs& a, const Launch& launch, const Place& at,
                                    const State<kDim>& state, Storage<T, kDim>& s) {
  using K = Tile<T, kDim>;
  constexpr int kStride = kDim + 4;
  const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
  const int dim_v = static_cast<int>(a.v.dim);
  float* all = reinterpret_cast<float*>(s.ring);
  __syncthreads();  // all warps are done with the ring; the group of copies that is still open is empty
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + 8 * half;
    const float l = warp_sum<4>(state.l[half]);
    if (t == 0) {
      s.m[warp][row] = state.m[half];
      s.l[warp][row] = l;
    }
    float* to = all + (warp * kRows + row) * kStride + 2 * t;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      to[n * 8] = state.acc[n][2 * half];
      to[n * 8 + 1] = state.acc[n][2 * half + 1];
    }
  }
  __syncthreads();  // all states are written
  for (int r = warp; r < at.rows; r += K::kWarps) {
    float m = kMinusInf, l = 0.f, weight[K::kWarps];
#pragma unroll
    for (int w = 0; w < K::kWarps; ++w) m = fmaxf(m, s.m[w][r]);
    const float shift = m == kMinusInf ? 0.f : m;
#pragma unroll
    for (int w = 0; w < K::kWarps; ++w) {
      weight[w] = fast_exp2(s.m[w][r] - shift);
      l += s.l[w][r] * weight[w];
    }
    const int64_t row = (at.batch_idx * a.num_q_heads + at.first_head) * a.q_len + at.row0 + r;
    const bool whole = launch.policy.num_splits == 1;
    const float factor = whole ? (l == 0.f ? 0.f : 1.f / l) : 1.f;
    float* part = whole ? nullptr : a.partial + (row * launch.policy.num_splits + at.split) * (a.v.dim + 2);
    if (lane == 0) {
      if (whole) {
        write_lse<T>(a, row, m, l);
      } else {
        part[0] = m;
        part[1] = l;
      }
    }
    T* out = whole ? out_row<T>(a, row) : nullptr;
    for (int c = lane; c < dim_v; c += kWarpSize) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < K::kWarps; ++w) sum += all[(w * kRows + r) * kStride + c] * weight[w];
      if (whole) {
        out[c] = T(sum * factor);
      } else {
        part[2 + c] = sum;
      }
    }
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(Tile<T, kDim>::kWarps* kWarpSize, Tile<T, kDim>::kBlocksPerSm)
    attend_selected_kernel(const AttendSelectedArgs a, const Launch launch) {
  using K = Tile<T, kDim>;
  TOKRED_SHARED_BYTES(shared);
  Storage<T, kDim>& s = *reinterpret_cast<Storage<T, kDim>*>(shared);
  float* bias = reinterpret_cast<float*>(shared + shared_tail_offset<Storage<T, kDim>>());
  const Place at = locate(a, launch);
  block_prepare(a, launch, at, s, bias);

  const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
  const int dim = static_cast<int>(a.k.dim), dim_v = static_cast<int>(a.v.dim);
  const int num_tiles = (at.entries + K::kKeys - 1) / K::kKeys;
  const T* k = static_cast<const T*>(a.k.data) + a.k.head_offset(at.batch_idx, at.kv_head);
  const T* v = static_cast<const T*>(a.v.data) + a.v.head_offset(at.batch_idx, at.kv_head);
  const auto fetch = [&](int tile, int stage) {
    if (tile < num_tiles) {
      const int32_t* slot = s.slot + tile * K::kKeys;
      warp_copy_rows<T, kDim>(s.ring[warp][stage][0], a.k, k, slot, a.pages.shift, launch.wide, kPadK);
      warp_copy_rows<T, kDim>(s.ring[warp][stage][1], a.v, v, slot, a.pages.shift, launch.wide, kPadV);
    }
    cp_async_commit();
  };
  const float* bias_of[2] = {bias, bias};
  if (launch.bias_rows > 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = at.row0 + (g + 8 * half < at.rows ? g + 8 * half : 0);
      bias_of[half] = bias + (row / a.q_len - at.row0 / a.q_len) * launch.policy.split;
    }
  }

  State<kDim> state;
  fetch(warp, 0);
  for (int tile = warp, stage = 0; tile < num_tiles; tile += K::kWarps, stage ^= 1) {
    __syncwarp();  // every lane has read the tile before, whose stage is filled now
    fetch(tile + K::kWarps, stage ^ 1);
    cp_async_wait<1>();
    __syncwarp();  // every lane's part of this tile has landed
    float score[K::kKeys / 8][4] = {};
    warp_scores<T, kDim>(s.q, s.ring[warp][stage][0], dim, score);
#pragma unroll
    for (int n = 0; n < K::kKeys / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = tile * K::kKeys + n * 8 + 2 * t + j % 2;
        const float added = launch.bias_rows > 0 ? bias_of[j / 2][key] : 0.f;
        score[n][j] = s.slot[key] >= 0 ? score[n][j] * launch.scale_log2 + added : kMinusInf;
      }
    }
    warp_softmax_step(score, state);
    warp_add_values<T, kDim>(score, s.ring[warp][stage][1], dim_v, state.acc);
  }
  block_finish(a, launch, at, state, s);
}

struct MergeStorage {
  BlockScratch scratch;
};

// One block per query row: its splits, in their order. Latency matters, not bytes, which are 2 % of the rows' own.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    attend_selected_merge_kernel(const AttendSelectedArgs a, const int num_splits) {
  TOKRED_SHARED_BYTES(shared);
  MergeStorage& s = *reinterpret_cast<MergeStorage*>(shared);
  float* weight = reinterpret_cast<float*>(shared + shared_tail_offset<MergeStorage>());
  const int64_t row = blockIdx.x, stride = a.v.dim + 2;
  const int thread = thread_rank(), dim_v = static_cast<int>(a.v.dim);
  const float* part = a.partial + row * num_splits * stride;
  float m = kMinusInf, l = 0.f;
  for (int i = thread; i < num_splits; i += kMergeThreads) m = fmaxf(m, part[i * stride]);
  m = block_max(m, s.scratch);
  const float shift = m == kMinusInf ? 0.f : m;
  for (int i = thread; i < num_splits; i += kMergeThreads) {
    weight[i] = fast_exp2(part[i * stride] - shift);
    l += weight[i] * part[i * stride + 1];
  }
  l = block_sum(l, s.scratch);  // its barriers also publish the weights
  if (thread == 0) write_lse<T>(a, row, m, l);
  const float factor = l == 0.f ? 0.f : 1.f / l;
  T* out = out_row<T>(a, row);
  for (int c = thread; c < dim_v; c += kMergeThreads) {
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < num_splits; ++i) sum += part[i * stride + 2 + c] * weight[i];
    out[c] = T(sum * factor);
  }
}

}  // namespace

int attend_selected_cuda(const AttendSelectedArgs& a, CUstream_st* stream) {
  const Launch config{choose_policy(a), a.scale * kLog2e, attend_bias_rows(a),
                      has_wide_rows(a.k, a.dtype) && has_wide_rows(a.v, a.dtype)};
  const AttendSelectedPolicy& p = config.policy;
  const int64_t blocks = a.batch_size * p.units * p.m_tiles * p.num_splits;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const size_t bias_bytes = static_cast<size_t>(config.bias_rows * p.split) * sizeof(float);
  int error = cudaErrorInvalidValue;
  dispatch_float(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    (void)dispatch_int<64, 128, 256>(p.tile_dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      error = launch(attend_selected_kernel<T, kDim>, dim3(static_cast<unsigned>(blocks)),
                     dim3(Tile<T, kDim>::kWarps * kWarpSize), shared_bytes_with_tail<Storage<T, kDim>>(bias_bytes),
                     stream, a, config);
    });
    if (error != cudaSuccess || p.num_splits == 1) return;
    const int64_t rows = a.batch_size * a.num_q_heads * a.q_len;
    const size_t weight_bytes = static_cast<size_t>(p.num_splits) * sizeof(float);
    error = launch(attend_selected_merge_kernel<T>, dim3(static_cast<unsigned>(rows)), dim3(kMergeThreads),
                   shared_bytes_with_tail<MergeStorage>(weight_bytes), stream, a, static_cast<int>(p.num_splits));
  });
  return error;
}

}  // namespace tokred
