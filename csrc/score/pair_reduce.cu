// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: x and y read once and 2 * num_x * num_y * dim flops per batch entry. A block meets 64 rows of x with a share
// of y (common/pair_tiles.cuh); each thread sums the function of its similarities, four rows of sixteen columns per
// tile, in registers. The order of additions is fixed by positions in the sequence: columns in a thread, tiles in a
// share, four lanes, two warps, and shares, which a second launch adds in double precision.
#include "common/pair_block.cuh"
#include "score/pair_reduce.h"

namespace tokred {
namespace {

struct ReduceStorage : PairStorage<> {
  float state[2][kPairBlockX][kPairReduceState];  // of the two warps that share a row
};

constexpr float kLog2E = 1.44269504088896341f;
// The largest logit of nobody: finite, so that differences are.
constexpr float kLowest = -3.4e38f;

__device__ inline float function_of(PairFunction function, float param, float value) {
  switch (function) {
    case PairFunction::kCountAbove:
      return value > param ? 1.f : 0.f;
    case PairFunction::kEluMargin: {
      const float above = value - param;
      return above <= 0.f ? expm1f(above) : above;  // NaN stays
    }
    case PairFunction::kGauss: {
      const float away = (1.f - value) / param;
      return expf(-0.5f * away * away);
    }
    default:
      return value;
  }
}

// Of a row: [0] the sum, [1] the count; or what is the state with softmax.
__device__ inline void add_state(float (&state)[kPairReduceState], const float (&other)[kPairReduceState],
                                 bool softmax) {
  if (softmax) {
    const float largest = state[0] > other[0] ? state[0] : other[0];
    const float own = expf(state[0] - largest), theirs = expf(other[0] - largest);
    state[1] = state[1] * own + other[1] * theirs;
    state[2] = state[2] * own + other[2] * theirs;
    state[0] = largest;
  } else {
    state[0] += other[0];
    state[1] += other[1];
  }
}

template <typename T, bool kVectorLoads>
__global__ void __launch_bounds__(kPairThreads, 2) pair_reduce_kernel(const PairReduceArgs args, int num_shares) {
  TOKRED_SHARED(ReduceStorage, shared);
  const PairInputs& in = args.in;
  const PairPlace place = pair_place(in, num_shares);
  const int64_t share_rows = pair_share_rows(place.s.num_y);
  if (place.x_begin >= place.s.num_x || place.share * share_rows >= place.s.num_y) return;  // the same in the block
  const int64_t y_end = min(place.s.num_y, (place.share + 1) * share_rows);
  const bool softmax = args.function == PairFunction::kSoftmaxMean;
  const bool rules = in.drop_mask || in.x_group.data || in.exclude_self;

  float state[4][kPairReduceState];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    state[r][0] = softmax ? kLowest : 0.f;
    state[r][1] = state[r][2] = 0.f;
  }
  block_meet_place<T, kVectorLoads>(
      shared, in, place, nullptr, static_cast<int>(place.share * share_rows / kPairBlockY),
      static_cast<int>(ceil_div(y_end, int64_t{kPairBlockY})), [&](PairAcc& acc, int first_y) {
        thread_similarities(acc, in.metric, shared);
        const bool whole = !rules && first_y + kPairBlockY <= shared.s.num_y;
        const uint64_t apart = whole ? 0 : thread_find_apart(in, shared, first_y);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (softmax) {
            float largest = state[r][0];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
              const float logit = pair_product(acc, r, i) / args.param;
              if (!(apart >> (16 * r + i) & 1) && logit > largest) largest = logit;
            }
            const float scale = exp2f((state[r][0] - largest) * kLog2E);
            state[r][0] = largest;
            state[r][1] *= scale;
            state[r][2] *= scale;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
              const float value = pair_product(acc, r, i);
              if (apart >> (16 * r + i) & 1) continue;
              const float weight = exp2f((value / args.param - largest) * kLog2E);
              state[r][1] += weight;
              state[r][2] += weight * value;
            }
          } else {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
              if (apart >> (16 * r + i) & 1) continue;
              state[r][0] += function_of(args.function, args.param, pair_product(acc, r, i));
              state[r][1] += 1.f;
            }
          }
        }
      });

  const PairCorner corner;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int offset = 2; offset > 0; offset /= 2) {  // the lanes that share a row; equal bits in all
      float other[kPairReduceState];
#pragma unroll
      for (int i = 0; i < kPairReduceState; ++i) other[i] = __shfl_xor_sync(kFullMask, state[r][i], offset);
      add_state(state[r], other, softmax);
    }
    if (lane_index() % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kPairReduceState; ++i) shared.state[warp_index() / 2][corner.row(r)][i] = state[r][i];
    }
  }
  __syncthreads();  // both warps of each row have written
  const int row = static_cast<int>(threadIdx.x);
  if (row >= kPairBlockX || place.x_begin + row >= place.s.num_x) return;
  add_state(shared.state[0][row], shared.state[1][row], softmax);
  double* out = args.partial + (place.share * in.total_x() + place.s.x_row + place.x_begin + row) * kPairReduceState;
  for (int i = 0; i < kPairReduceState; ++i) out[i] = double{shared.state[0][row][i]};
}

// A thread per row of x.
__global__ void __launch_bounds__(kPairFinishThreads) pair_reduce_finish_kernel(const PairReduceArgs args) {
  const PairInputs& in = args.in;
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t first_row = int64_t{blockIdx.x} * blockDim.x + warp_index() * kWarpSize;
  if (first_row >= in.total_x()) return;  // the same in the whole warp
  int64_t num_y = in.num_y;
  if (in.cu_x) {  // the last sequence that starts at the row or before
    int low = 0, high = static_cast<int>(in.batch_size) - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (in.cu_x[middle] <= row) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    num_y = pair_sequence(in, low).num_y;
  }
  if (row >= in.total_x()) return;
  const int64_t num_shares = num_y > 0 ? pair_num_shares(num_y) : 0;
  args.out[row] = pair_finish(args.function, num_shares, [&](int64_t share, int i) {
    return args.partial[(share * in.total_x() + row) * kPairReduceState + i];
  });
}

}  // namespace

int pair_reduce_cuda(const PairReduceArgs& args, CUstream_st* stream) {
  const PairReducePolicy policy = choose_policy(args);
  int error = cudaSuccess;
  dispatch_float(args.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(policy.x_blocks * policy.num_shares)), block(kPairThreads);
    const auto kernel = policy.vector_loads ? pair_reduce_kernel<T, true> : pair_reduce_kernel<T, false>;
    error = launch(kernel, grid, block, sizeof(ReduceStorage), stream, args, policy.num_shares);
  });
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.in.total_x(), int64_t{kPairFinishThreads})));
  return launch(pair_reduce_finish_kernel, grid, dim3(kPairFinishThreads), 0, stream, args);
}

}  // namespace tokred
