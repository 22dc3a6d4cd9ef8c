// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: one symmetric product, then k dependent picks. Three launches: each token's norm; tiles of the product on and
// above the diagonal, each similarity written to both of its places; and one block per sequence that makes all picks.
// A pick costs one row of similarities (from L2, some 300 ns) and one barrier: tokens stay in registers, one to four a
// thread, and the best one is found by two warp reductions before the barrier and two after it. Beyond 4,096 tokens
// similarities are not kept: the picking block multiplies the row of each pick itself, one warp per token.
#include "common/launch.cuh"
#include "common/row_tiles.cuh"
#include "select/select_diverse.h"
#include "select/select_diverse_pick.cuh"

namespace tokred {
namespace {

constexpr int kStages = 3;
constexpr int kRows = kDiverseBlockRows, kCols = kDiverseBlockCols;

// grid: batch_size * blocks of tokens, one warp per token.
template <typename T, int kVec>
__global__ void __launch_bounds__(kDiversePrepareThreads) select_diverse_prepare_kernel(const SelectDiverseArgs args) {
  constexpr int kPerBlock = kDiversePrepareThreads / kWarpSize;
  const int64_t blocks = ceil_div<int64_t>(args.max_seqlen, kPerBlock);
  const int64_t batch_idx = blockIdx.x / blocks;
  const int64_t token = static_cast<int64_t>(blockIdx.x) % blocks * kPerBlock + warp_index();
  const TokenSpan span = diverse_span(args, batch_idx);
  if (token >= span.len) return;  // the whole warp
  const T* row = first_token<T>(args, batch_idx, span) + token * args.stride_token;
  const float squares = warp_dot<T, kVec>(row, row, args.dim);
  float term = diverse_term(args.metric, squares, sqrtf(squares));
  if (args.positions) {
    const float* xyz = args.positions + 3 * (diverse_first_token(args, batch_idx, span) + token);
    for (int c = 0; c < 3; ++c) term += diverse_zero_if_finite(xyz[c]);
  }
  if (lane_index() == 0) {
    args.term[batch_idx * args.max_seqlen + token] = term;
    if (args.nearest) args.nearest[batch_idx * args.max_seqlen + token] = kKeyExcluded;
  }
}

struct GramStorage {
  StepTile<kRows> rows[kStages];
  StepTile<kCols> cols[kStages];
  float row_term[kRows], col_term[kCols];
  unsigned char row_skip[kRows], col_skip[kCols];  // nobody's nearest
};

// Column c of tiles has 2 c + 2 tiles of rows, so c * (c + 1) tiles come before it.
__device__ inline int tile_column(unsigned tile) {
  int column = static_cast<int>((sqrtf(4.f * static_cast<float>(tile) + 1.f) - 1.f) * 0.5f);
  while (static_cast<unsigned>(column) * (static_cast<unsigned>(column) + 1) > tile) --column;
  while ((static_cast<unsigned>(column) + 1) * (static_cast<unsigned>(column) + 2) <= tile) ++column;
  return column;
}

// Turns a warp's accumulators into similarities and writes those on and above the diagonal, twice. row_begin and
// col_begin: tokens of the warp's first row and column. Offsets in gram fit 32 bits: it has 2^24 elements at most.
__device__ inline void warp_write(const SelectDiverseArgs& args, float (&acc)[2][8][4], const float* row_term,
                                  const float* col_term, int row_begin, int col_begin, int len, float* gram) {
  const int lane = lane_index(), n = static_cast<int>(args.max_seqlen);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = 16 * (r / 2) + 8 * (r % 2) + lane / 4;
    const float term = row_term[row];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int col = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
      float& value = acc[r / 2][i / 2][2 * (r % 2) + i % 2];
      value = diverse_similarity(args.metric, value, term, col_term[col]);
      if (gram && row_begin + row <= col_begin + col && col_begin + col < len) {
        gram[(row_begin + row) * n + col_begin + col] = value;
        gram[(col_begin + col) * n + row_begin + row] = value;
      }
    }
  }
}

// Folds a warp's similarities into the nearest tokens of its rows and columns. A key is 0 where a pair does not count:
// below the diagonal, a token with itself, past the end. The largest of keys does not depend on their order.
__device__ inline void warp_fold_nearest(float (&acc)[2][8][4], const unsigned char* row_skip,
                                         const unsigned char* col_skip, int row_begin, int col_begin, int len,
                                         uint32_t* nearest) {
  const int lane = lane_index();
  uint32_t best_of_row[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int col = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
    uint32_t best = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = 16 * (r / 2) + 8 * (r % 2) + lane / 4;
      const bool pair = row_begin + row < col_begin + col && col_begin + col < len;
      const uint32_t key = pair ? score_key(acc[r / 2][i / 2][2 * (r % 2) + i % 2]) : 0;
      if (!col_skip[col]) best_of_row[r] = max(best_of_row[r], key);
      if (!row_skip[row]) best = max(best, key);
    }
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2) best = max(best, __shfl_xor_sync(kFullMask, best, offset));
    if (lane < 4 && best > 0) atomicMax(nearest + col_begin + col, best);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t best = warp_reduce<4>(best_of_row[r], Max());
    if (lane % 4 == 0 && best > 0) atomicMax(nearest + row_begin + 16 * (r / 2) + 8 * (r % 2) + lane / 4, best);
  }
}

// grid: sequences of the group * tiles.
template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kTileThreads, kVectorLoads && sizeof(T) == 2 ? 3 : 2)
    select_diverse_gram_kernel(const SelectDiverseArgs args, int64_t first_batch, unsigned tiles) {
  TOKRED_SHARED(GramStorage, shared);
  const int64_t in_group = blockIdx.x / tiles, batch_idx = first_batch + in_group;
  const unsigned tile = blockIdx.x % tiles;
  const int column = tile_column(tile);
  const int64_t row_begin = (static_cast<int64_t>(tile) - int64_t{column} * (column + 1)) * kRows;
  const int64_t col_begin = int64_t{column} * kCols;
  const TokenSpan span = diverse_span(args, batch_idx);
  if (row_begin >= span.len || col_begin >= span.len) return;  // the whole block
  const T* x = first_token<T>(args, batch_idx, span);
  const float* term = args.term + batch_idx * args.max_seqlen;
  const uint8_t* drop = args.drop_mask ? args.drop_mask + diverse_first_token(args, batch_idx, span) : nullptr;
  for (int i = static_cast<int>(threadIdx.x); i < kRows + kCols; i += kTileThreads) {
    const int64_t token = i < kRows ? row_begin + i : col_begin + i - kRows;
    const bool valid = token < span.len;
    (i < kRows ? shared.row_term[i] : shared.col_term[i - kRows]) = valid ? term[token] : 0.f;
    (i < kRows ? shared.row_skip[i] : shared.col_skip[i - kRows]) = valid && drop && drop[token];
  }

  const int num_steps = static_cast<int>(max(ceil_div<int64_t>(args.dim * sizeof(T), kStepBytes), int64_t{1}));
  const auto load = [&](int step) {
    if (step < num_steps) {
      const int64_t depth = int64_t{step} * (kStepBytes / sizeof(T));
      thread_load<T, kVectorLoads>(shared.rows[step % kStages], x + row_begin * args.stride_token, args.stride_token,
                                   span.len - row_begin, depth, args.dim);
      thread_load<T, kVectorLoads>(shared.cols[step % kStages], x + col_begin * args.stride_token, args.stride_token,
                                   span.len - col_begin, depth, args.dim);
    }
    cp_async_commit();
  };
  const int first_row = warp_index() % 2 * 32, first_col = warp_index() / 2 * 64;
  float acc[2][8][4] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < num_steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step is there for all, and the one before is read by all; at first, terms are written
    load(step + kStages - 1);
    const int num_cols = static_cast<int>(min(span.len - col_begin, int64_t{kCols}));
    warp_product<T>(shared.rows[step % kStages], shared.cols[step % kStages], first_row, first_col, num_cols, acc);
  }
  const int row = static_cast<int>(row_begin) + first_row, col = static_cast<int>(col_begin) + first_col;
  const int len = static_cast<int>(span.len);
  float* gram = args.gram ? args.gram + in_group * args.max_seqlen * args.max_seqlen : nullptr;
  warp_write(args, acc, shared.row_term + first_row, shared.col_term + first_col, row, col, len, gram);
  if (args.nearest) {
    warp_fold_nearest(acc, shared.row_skip + first_row, shared.col_skip + first_col, row, col, len,
                      args.nearest + batch_idx * args.max_seqlen);
  }
}

template <typename T, bool kVectorLoads>
int run(const SelectDiverseArgs& args, const SelectDiversePolicy& policy, CUstream_st* stream) {
  constexpr int kVec = kVectorLoads ? 16 / sizeof(T) : 1;
  const dim3 picking(static_cast<unsigned>(policy.threads));
  const int64_t prepare = args.batch_size * ceil_div<int64_t>(args.max_seqlen, kDiversePrepareThreads / kWarpSize);
  int error = launch(select_diverse_prepare_kernel<T, kVec>, dim3(static_cast<unsigned>(prepare)),
                     dim3(kDiversePrepareThreads), 0, stream, args);
  for (int64_t first = 0; first < args.batch_size && error == cudaSuccess; first += policy.group_size) {
    const unsigned count = static_cast<unsigned>(std::min(policy.group_size, args.batch_size - first));
    const unsigned tiles = static_cast<unsigned>(policy.tiles);
    error = launch(select_diverse_gram_kernel<T, kVectorLoads>, dim3(count * tiles), dim3(kTileThreads),
                   sizeof(GramStorage), stream, args, first, tiles);
    if (error != cudaSuccess) return error;
    if (policy.items == 0) {
      error = launch(select_diverse_stream_kernel<T, kVec>, dim3(count), picking, sizeof(PickStorage), stream, args);
    } else {
      (void)dispatch_int<1, 4>(policy.items, [&](auto items) {
        error = launch(select_diverse_pick_kernel<decltype(items)::value>, dim3(count), picking, sizeof(PickStorage),
                       stream, args, first);
      });
    }
  }
  return error;
}

}  // namespace

int select_diverse_cuda(const SelectDiverseArgs& args, CUstream_st* stream) {
  if (args.batch_size == 0) return cudaSuccess;
  const SelectDiversePolicy policy = choose_policy(args, reinterpret_cast<uint64_t>(args.x));
  int error = cudaSuccess;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    error = policy.vector_loads ? run<T, true>(args, policy, stream) : run<T, false>(args, policy, stream);
  });
  return error;
}

}  // namespace tokred
