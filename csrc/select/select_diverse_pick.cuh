// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// select_diverse's last launch: one block makes all picks of a sequence. Included by select_diverse.cu alone.
#pragma once
#include "common/block.cuh"
#include "common/launch.cuh"
#include "common/score_key.h"
#include "select/select_diverse.h"

namespace tokred {
namespace {

template <typename T>
__device__ inline const T* first_token(const SelectDiverseArgs& args, int64_t batch_idx, const TokenSpan& span) {
  return static_cast<const T*>(args.x) + batch_idx * args.stride_batch + span.begin * args.stride_token;
}

// Sum of products of two rows; valid in every lane.
template <typename T, int kVec>
__device__ inline float warp_dot(const T* a, const T* b, int64_t dim) {
  float sum = 0.f;
#pragma unroll 2
  for (int64_t c = lane_index() * kVec; c < dim; c += kWarpSize * kVec) {
    const auto left = load_pack<kVec>(a + c), right = load_pack<kVec>(b + c);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += static_cast<float>(left.v[i]) * static_cast<float>(right.v[i]);
  }
  return warp_sum(sum);
}

constexpr int kFree = -1, kExcluded = -2;  // not picked; never to be picked

// What the picking block knows of its tokens: item i of thread t is token i * blockDim.x + t. for_each(f) calls
// f(token, state, folded, pick): the state that values are made of; the same with the picks of this step; and the
// number of the pick that took the token, kFree or kExcluded. A thread only ever meets its own tokens.
template <int kItems>
struct RegisterTokens {
  float state[kItems], folded[kItems];
  int pick[kItems];

  template <typename F>
  __device__ void for_each(F&& f) {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      f(i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x), state[i], folded[i], pick[i]);
  }
};
struct StreamTokens {
  float *state, *folded;
  int* pick;
  int len;

  template <typename F>
  __device__ void for_each(F&& f) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < len; i += static_cast<int>(blockDim.x))
      f(i, state[i], folded[i], pick[i]);
  }
};

// Rows of similarities that are there.
struct GramRows {
  const float* gram;
  int64_t stride;
  __device__ const float* row(int pick) const { return gram + pick * stride; }
};
// Rows made when asked for, by all threads of the block. The next one may be asked for after a barrier.
template <typename T, int kVec>
struct StreamRows {
  const T* x;
  const float* term;
  float* out;
  int64_t stride_token, dim;
  int len;
  DiverseMetric metric;

  __device__ const float* row(int pick) const {
    const int num_warps = num_threads_in_block() / kWarpSize;
#pragma unroll 1
    for (int token = warp_index(); token < len; token += num_warps) {
      const float dot = warp_dot<T, kVec>(x + token * stride_token, x + pick * stride_token, dim);
      if (lane_index() == 0) out[token] = diverse_similarity(metric, dot, term[token], term[pick]);
    }
    __syncthreads();  // the row is whole
    return out;
  }
};

struct PickStorage {
  uint32_t key[2][kWarpSize];  // the best of each warp; two sets, so that a pick needs one barrier
  int token[2][kWarpSize];
  BlockScratch block;
};
struct Best {
  uint32_t key;
  int token;
};

// The free token of the largest value(token, state), the lowest of equal ones; valid in every thread. set alternates.
template <typename Tokens, typename Value>
__device__ inline Best block_best(Tokens& tokens, Value&& value, int set, PickStorage& shared) {
  Best best{kKeyExcluded, 0x7fffffff};
  tokens.for_each([&](int token, float state, float, int pick) {
    if (pick != kFree) return;
    const uint32_t key = score_key(value(token, state));
    if (key > best.key) best = {key, token};  // a thread's tokens ascend
  });
  const uint32_t of_warp = warp_max(best.key);
  const int token = warp_min(best.key == of_warp ? best.token : 0x7fffffff);
  const int lane = lane_index(), num_warps = num_threads_in_block() / kWarpSize;
  if (lane == 0) {
    shared.key[set][warp_index()] = of_warp;
    shared.token[set][warp_index()] = token;
  }
  __syncthreads();  // this set is written; the readers of the other one passed the barrier before
  const uint32_t key = lane < num_warps ? shared.key[set][lane] : kKeyExcluded;
  const uint32_t of_block = warp_max(key);
  return {of_block, warp_min(lane < num_warps && key == of_block ? shared.token[set][lane] : 0x7fffffff)};
}

__device__ inline float value_of_key(uint32_t key) {
  if (key <= kKeyNaN) return kDiverseNaN;
  return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

__device__ inline float distance(const float* a, const float* b) {
  return sqrtf(diverse_geometry(a[0] - b[0], a[1] - b[1], a[2] - b[2]));
}

// All picks of one sequence.
template <typename Tokens, typename RowSource>
__device__ inline void block_pick(const SelectDiverseArgs& args, int64_t batch_idx, const TokenSpan& span,
                                  Tokens& tokens, const RowSource& rows, PickStorage& shared) {
  const int64_t first = diverse_first_token(args, batch_idx, span);
  const int64_t first_weight = batch_idx * args.stride_weight + span.begin;
  const float* term = args.term + batch_idx * args.max_seqlen;
  const uint32_t* nearest = args.nearest ? args.nearest + batch_idx * args.max_seqlen : nullptr;
  const float* xyz = args.positions ? args.positions + 3 * first : nullptr;
  const bool weighted = args.weight.data != nullptr;
  const DiverseScale scale = diverse_scale(args);
  int64_t* kept = args.kept_idx + batch_idx * args.k;
  float* out_value = args.value + batch_idx * args.k;

  int eligible = 0;
  tokens.for_each([&](int token, float& state, float& folded, int& pick) {
    const bool open = token < span.len && !(args.drop_mask && args.drop_mask[first + token]);
    const bool number = open && term[token] == term[token];
    state = folded = number ? diverse_initial(args.rule) : kDiverseNaN;
    pick = open ? kFree : kExcluded;
    eligible += open;
  });
  eligible = block_sum(eligible, shared.block);
  const int count = static_cast<int>(min(args.k, int64_t{eligible}));

  int given = -1;
  if (args.start == DiverseStart::kGiven && count > 0) {
    const int64_t wanted = args.start_idx[batch_idx];
    const bool open = wanted >= 0 && wanted < span.len && !(args.drop_mask && args.drop_mask[first + wanted]);
    given = open ? static_cast<int>(wanted) : -1;
  }
  const auto start_value = [&](int token, float state) {
    if (state != state) return kDiverseNaN;
    if (args.start == DiverseStart::kWeight) return args.weight[first_weight + token];
    if (args.start != DiverseStart::kFarthest) return kDiverseInf;
    const uint32_t key = nearest[token];
    const float base = args.metric == DiverseMetric::kCosine ? 1.f : 0.f;
    return base - (key > kKeyNaN ? value_of_key(key) : -kDiverseInf);
  };
  const auto rule_value = [&](int token, float state) {
    return diverse_value(args.rule, scale.base, args.lam, state, weighted,
                         weighted ? args.weight[first_weight + token] : 0.f);
  };

  bool started = false;  // values are those of the rule
  int64_t left = args.start == DiverseStart::kWeight ? args.picks_per_step : 1;
  float per_distance = 0.f;
  for (int i = 0; i < count; ++i) {
    Best best = block_best(
        tokens,
        [&](int token, float state) {
          // A given token stands out; without one all are equal and the lowest is taken.
          if (given >= 0) return token == given ? kDiverseInf : -kDiverseInf;
          return started ? rule_value(token, state) : start_value(token, state);
        },
        i % 2, shared);
    if (given >= 0 && !(term[given] == term[given])) best.key = kKeyNaN;
    given = -1;
    const int picked = best.token;
    const float value = value_of_key(best.key);
    if (threadIdx.x == 0 && !args.by_index) {
      kept[i] = picked;
      out_value[i] = value;
    }
    const bool last = i + 1 == count, end_of_step = --left == 0;
    const float* row = last ? nullptr : rows.row(picked);
    if (xyz && i == 0) {
      float largest = 0.f;
      tokens.for_each([&](int token, float state, float, int) {
        if (state == state) largest = fmaxf(largest, distance(xyz + 3 * token, xyz + 3 * picked));
      });
      per_distance = diverse_per_distance(args.position_weight, block_max(largest, shared.block));
    }
    tokens.for_each([&](int token, float& state, float& folded, int& pick) {
      if (token == picked) {
        pick = i;
        state = value;  // kept for the end
      }
      if (pick != kFree || last) return;
      float similarity = row[token];
      if (xyz) {
        similarity =
            diverse_with_position(similarity, scale.feature, distance(xyz + 3 * token, xyz + 3 * picked), per_distance);
      }
      folded = diverse_fold(args.rule, folded, similarity);
      if (end_of_step) state = folded;
    });
    if (end_of_step) {
      left = args.picks_per_step;
      started = true;
    }
  }
  if (args.by_index) {
    int slots = 0;  // tokens taken before this tile
    for (int tile = 0; tile < span.len; tile += static_cast<int>(blockDim.x)) {
      int taken = 0;
      float value = 0.f;
      const int own = tile + static_cast<int>(threadIdx.x);
      tokens.for_each([&](int token, float state, float, int pick) {
        if (token == own && pick >= 0) {
          taken = 1;
          value = state;
        }
      });
      int total;
      const int before = block_exclusive_scan(taken, shared.block, &total);
      if (taken) {
        kept[slots + before] = own;
        out_value[slots + before] = value;
      }
      slots += total;
    }
  }
  for (int64_t i = count + static_cast<int64_t>(threadIdx.x); i < args.k; i += blockDim.x) {
    kept[i] = -1;
    out_value[i] = -kDiverseInf;
  }
  if (threadIdx.x == 0) args.num_kept[batch_idx] = count;
}

// grid: sequences of the group.
template <int kItems>
__global__ void __launch_bounds__(kDiverseMaxThreads)
    select_diverse_pick_kernel(const SelectDiverseArgs args, int64_t first_batch) {
  TOKRED_SHARED(PickStorage, shared);
  const int64_t batch_idx = first_batch + blockIdx.x, n = args.max_seqlen;
  RegisterTokens<kItems> tokens;
  block_pick(args, batch_idx, diverse_span(args, batch_idx), tokens, GramRows{args.gram + blockIdx.x * n * n, n},
             shared);
}

// The same beyond kDiverseGramTokens. grid: batch_size.
template <typename T, int kVec>
__global__ void __launch_bounds__(kDiverseStreamThreads, 1) select_diverse_stream_kernel(const SelectDiverseArgs args) {
  TOKRED_SHARED(PickStorage, shared);
  const int64_t batch_idx = blockIdx.x, n = args.max_seqlen, all = args.batch_size * n;
  const TokenSpan span = diverse_span(args, batch_idx);
  const int len = static_cast<int>(span.len);
  float* own = args.rows + batch_idx * n;
  StreamTokens tokens{own + all, own + 2 * all, args.pick + batch_idx * n, len};
  const StreamRows<T, kVec> rows{first_token<T>(args, batch_idx, span),
                                 args.term + batch_idx * n,
                                 own,
                                 args.stride_token,
                                 args.dim,
                                 len,
                                 args.metric};
  block_pick(args, batch_idx, span, tokens, rows, shared);
}

}  // namespace
}  // namespace tokred
