// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: x and y read once and 2 * num_x * num_y * dim flops per batch entry; of few x rows, reading y. A block meets
// 64 rows of x with a share of y (common/pair_tiles.cuh) and keeps each row's best: one in registers, or a list of up
// to 32 in shared memory, sorted, one place per lane. Lists belong to a warp (its 64 of a tile's 128 columns), so that
// tiles need no further barrier: what does not beat the last place is dropped where it appears, a few candidates are
// inserted by votes, many are sorted by a bitonic network and merged. Whatever is kept is ordered by one 64-bit number,
// (key of the similarity, complement of the index), of which no two are equal: the shares change no bit. A second
// launch merges them. Lists beyond 32 take several passes, each below the last of the pass before.
#include "common/pair_block.cuh"
#include "common/score_key.h"
#include "score/pair_topk.h"

namespace tokred {
namespace {

using Packed = unsigned long long;

// Larger is better; 0 is nothing.
__device__ inline Packed pack(float value, int64_t j) {
  return static_cast<Packed>(score_key(value)) << 32 | (0xffffffffu - static_cast<uint32_t>(j));
}

// A sorted list over the lanes, best first: the 32 best of it and of other, sorted as well. Valid in every lane.
__device__ inline Packed warp_merge(Packed list, Packed other) {
  const int lane = lane_index();
  Packed best = max(list, __shfl_sync(kFullMask, other, kWarpSize - 1 - lane));  // rises, then falls
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const Packed partner = __shfl_xor_sync(kFullMask, best, step);
    best = (lane & step) == 0 ? max(best, partner) : min(best, partner);
  }
  return best;
}

// One value per lane, sorted best first.
__device__ inline Packed warp_sort(Packed value) {
  const int lane = lane_index();
#pragma unroll
  for (int run = 2; run <= kWarpSize; run *= 2) {
#pragma unroll
    for (int step = run / 2; step > 0; step /= 2) {
      const Packed partner = __shfl_xor_sync(kFullMask, value, step);
      const bool takes_max = ((lane & step) == 0) == ((lane & run) == 0);
      value = takes_max ? max(value, partner) : min(value, partner);
    }
  }
  return value;
}

// The list with one candidate per lane taken in; 0 is none.
__device__ inline Packed warp_take(Packed list, Packed candidate) {
  unsigned votes = __ballot_sync(kFullMask, candidate != 0);
  if (__popc(votes) > 4) return warp_merge(list, warp_sort(candidate));
  for (; votes; votes &= votes - 1) {
    const Packed one = __shfl_sync(kFullMask, candidate, __ffs(static_cast<int>(votes)) - 1);
    const int place = __popc(__ballot_sync(kFullMask, list > one));
    const Packed before = __shfl_up_sync(kFullMask, list, 1);
    if (lane_index() >= place) list = lane_index() == place ? one : before;
  }
  return list;
}

// Similarities of a tile; NaN where rows do not meet.
template <int kStages>
__device__ inline void thread_meet(PairAcc& acc, const PairInputs& in, const PairStorage<kStages>& block, int first_y) {
  thread_similarities(acc, in.metric, block);
  if (!in.x_group.data && !in.exclude_self) return;  // what is dropped is NaN already
  const uint64_t apart = thread_find_apart(in, block, first_y);
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (apart >> i & 1) pair_product(acc, i / 16, i % 16) = __uint_as_float(0x7fc00000u);
  }
}

// What a pass writes: places [first, first + count) of the lists, for each share.
struct Pass {
  uint64_t* out;
  int64_t stride_split, stride_row;
  int first, count;
};

struct KeepNearest {
  struct Storage : PairStorage<> {
    Packed best[2][kPairBlockX];  // of the two warps that share a row
  };
  const PairTopkArgs& args;
  Storage& shared;
  PairBest best;  // column -2 - j: nothing but NaN so far, first with j

  __device__ KeepNearest(const PairTopkArgs& of, Storage& storage, const Pass&) : args(of), shared(storage) {}

  __device__ void fold(PairAcc& acc, int first_y) {
    const PairCorner corner;
    thread_meet(acc, args.in, shared, first_y);
    thread_fold_best(acc, first_y, [](int, int, float value) { return value; }, best);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (best.column[r] != -1) continue;
#pragma unroll 1  // rare
      for (int i = 15; i >= 0; --i) {
        const int j = first_y + corner.column(i);
        if (shared.meets(args.in, corner.row(r), j)) best.column[r] = -2 - j;
      }
    }
  }
  __device__ void write(uint64_t* out, const Pass& pass, int rows) {
    Packed packed[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int column = best.column[r];
      packed[r] = column >= 0   ? pack(best.value[r], column)
                  : column < -1 ? pack(__uint_as_float(0x7fc00000u), -2 - column)
                                : 0;
    }
    warp_join_best(packed, shared.best);
    __syncthreads();  // both warps of each row have written
    const int row = static_cast<int>(threadIdx.x);
    if (row < rows) out[row * pass.stride_row] = max(shared.best[0][row], shared.best[1][row]);
  }
};

struct KeepLists {
  static constexpr int kWarpRows = 32, kWarpColumns = 64;
  struct Storage : PairStorage<2> {
    Packed list[kPairThreads / kWarpSize][kWarpRows][kPairPassK];
    float value[kPairThreads / kWarpSize][4][kWarpColumns];  // of four rows; columns permuted for the banks
  };
  const PairTopkArgs& args;
  Storage& shared;
  const Pass& pass;

  __device__ KeepLists(const PairTopkArgs& of, Storage& storage, const Pass& now)
      : args(of), shared(storage), pass(now) {
    for (int row = 0; row < kWarpRows; ++row) shared.list[warp_index()][row][lane_index()] = 0;
    __syncwarp();  // the lanes read each other's places
  }

  // Only what comes after the last of the pass before is taken.
  __device__ Packed bound(int row) const {
    if (pass.first == 0) return ~Packed{0};
    const int64_t last = (shared.s.x_row + shared.x_begin + row) * args.k + pass.first - 1, j = args.idx[last];
    return j < 0 ? 0 : pack(args.value[last], j);
  }

  // A row's 64 values, two per lane.
  __device__ Packed take(Packed list, int row, const float* values, int swizzle, int first_y) const {
    const Packed worst = __shfl_sync(kFullMask, list, pass.count - 1), below = bound(row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = lane_index() + kWarpSize * half;
      const float value = values[column ^ swizzle];
      Packed candidate = pack(value, first_y + column);
      if (candidate <= worst || candidate >= below || (value != value && !shared.meets(args.in, row, first_y + column)))
        candidate = 0;
      list = warp_take(list, candidate);
    }
    return list;
  }

  __device__ void fold(PairAcc& acc, int first_y) {
    const PairCorner corner;
    const int lane = lane_index();
    float (*const values)[kWarpColumns] = shared.value[warp_index()];
    thread_meet(acc, args.in, shared, first_y);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int first = 16 * (r / 2) + 8 * (r % 2);
      const uint32_t worst = static_cast<uint32_t>(shared.list[warp_index()][first + lane / 4][pass.count - 1] >> 32);
      const float threshold = key_score(worst);
      bool any = worst <= kKeyNaN;  // a place is free, or taken by NaN
#pragma unroll
      for (int i = 0; i < 16; ++i) any |= pair_product(acc, r, i) > threshold;
      const unsigned votes = __ballot_sync(kFullMask, any && shared.x_begin + corner.row(r) < shared.s.num_x);
      if (votes == 0) continue;
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        if (lane / 16 == half) {
#pragma unroll
          for (int i = 0; i < 16; i += 2) {
            Pack<float, 2> two;
            two.v[0] = pair_product(acc, r, i);
            two.v[1] = pair_product(acc, r, i + 1);
            store_pack(&values[lane / 4 % 4][(corner.column(i) - corner.first_col) ^ (8 * (lane / 4 % 4))], two);
          }
        }
        __syncwarp();  // the values are there
        for (int g = 0; g < 4; ++g) {
          const int row = first + 4 * half + g;
          if ((votes >> (16 * half + 4 * g) & 15u) == 0) continue;
          Packed& place = shared.list[warp_index()][row][lane];
          place = take(place, corner.first_row + row, values[g], 8 * g, first_y + corner.first_col);
        }
        __syncwarp();  // lists are whole, values are read
      }
    }
  }
  __device__ void write(uint64_t* out, const Pass&, int rows) {
    __syncthreads();  // the lists of both warps of each row are whole
    constexpr int kRows = kPairBlockX / (kPairThreads / kWarpSize);
    for (int row = warp_index() * kRows; row < min((warp_index() + 1) * kRows, rows); ++row) {
      const int half = row / kWarpRows, lane = lane_index();
      const Packed list =
          warp_merge(shared.list[half][row % kWarpRows][lane], shared.list[half + 2][row % kWarpRows][lane]);
      if (lane < pass.count) out[row * pass.stride_row + lane] = list;
    }
  }
};

template <typename T, bool kVectorLoads, typename Keep>
__global__ void __launch_bounds__(kPairThreads,
                                  kVectorLoads && sizeof(T) == 2 && std::is_same_v<Keep, KeepNearest> ? 3 : 2)
    pair_topk_kernel(const PairTopkArgs args, int num_splits, const Pass pass) {
  TOKRED_SHARED(typename Keep::Storage, shared);
  const PairInputs& in = args.in;
  const PairPlace place = pair_place(in, num_splits);
  const PairSequence& s = place.s;
  if (place.x_begin >= s.num_x) return;  // the same in the whole block
  const int64_t num_tiles = ceil_div(s.num_y, int64_t{kPairBlockY});
  const int tile_begin = static_cast<int>(num_tiles * place.share / num_splits);
  const int tile_end = static_cast<int>(num_tiles * (place.share + 1) / num_splits);
  Keep keep(args, shared, pass);
  block_meet_place<T, kVectorLoads>(shared, in, place, args.bias, tile_begin, tile_end,
                                    [&](PairAcc& acc, int first_y) { keep.fold(acc, first_y); });
  keep.write(pass.out + place.share * pass.stride_split + (s.x_row + place.x_begin) * pass.stride_row, pass,
             static_cast<int>(min(s.num_x - place.x_begin, int64_t{kPairBlockX})));
}

struct MergeStorage {
  Packed list[kPairMergeThreads / kWarpSize][kWarpSize];
};

// kWarps warps per row of x merge what the shares have found, and write it out.
template <int kWarps>
__global__ void __launch_bounds__(kPairMergeThreads)
    pair_topk_merge_kernel(const PairTopkArgs args, int num_splits, const Pass pass) {
  TOKRED_SHARED(MergeStorage, shared);
  constexpr int kRows = kPairMergeThreads / kWarpSize / kWarps;
  const int lane = lane_index(), part = warp_index() % kWarps;
  const int64_t row = int64_t{blockIdx.x} * kRows + warp_index() / kWarps;
  const bool exists = row < args.in.total_x();
  const uint64_t* lists = pass.out + row * pass.stride_row;
  Packed list = 0;
  if (exists && pass.count == 1) {  // one value per share
    for (int split = part * kWarpSize + lane; split < num_splits; split += kWarps * kWarpSize) {
      list = max(list, static_cast<Packed>(lists[split * pass.stride_split]));
    }
    list = warp_reduce(list, Max());
  } else if (exists) {
    for (int split = part; split < num_splits; split += kWarps) {
      list = warp_merge(list, lane < pass.count ? lists[split * pass.stride_split + lane] : 0);
    }
  }
  if constexpr (kWarps > 1) {
    shared.list[warp_index()][lane] = list;
    __syncthreads();  // all lists are written
    if (part != 0) return;
    for (int other = 1; other < kWarps; ++other) list = warp_merge(list, shared.list[warp_index() + other][lane]);
  }
  if (!exists || lane >= pass.count) return;
  const int64_t at = row * args.k + pass.first + lane;
  args.value[at] = list ? key_score(static_cast<uint32_t>(list >> 32)) : -__uint_as_float(0x7f800000u);
  args.idx[at] = list ? int64_t{0xffffffffu - static_cast<uint32_t>(list)} : -1;
}

template <typename Keep>
int launch_pass(const PairTopkArgs& args, const PairTopkPolicy& policy, const Pass& pass, CUstream_st* stream) {
  int error = cudaSuccess;
  dispatch_float(args.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(policy.x_blocks * policy.num_splits)), block(kPairThreads);
    const auto kernel = policy.vector_loads ? pair_topk_kernel<T, true, Keep> : pair_topk_kernel<T, false, Keep>;
    error = launch(kernel, grid, block, sizeof(typename Keep::Storage), stream, args, policy.num_splits, pass);
  });
  if (error != cudaSuccess) return error;
  (void)dispatch_int<1, 8>(policy.merge_warps, [&](auto warps) {
    constexpr int kRows = kPairMergeThreads / kWarpSize / decltype(warps)::value;
    const dim3 grid(static_cast<unsigned>(ceil_div(args.in.total_x(), int64_t{kRows}))), block(kPairMergeThreads);
    error = launch(pair_topk_merge_kernel<decltype(warps)::value>, grid, block, sizeof(MergeStorage), stream, args,
                   policy.num_splits, pass);
  });
  return error;
}

}  // namespace

int pair_topk_cuda(const PairTopkArgs& args, CUstream_st* stream) {
  const PairTopkPolicy policy = choose_policy(args);
  for (int first = 0; first < args.k; first += kPairPassK) {
    const int count = static_cast<int>(std::min<int64_t>(args.k - first, kPairPassK));
    const int64_t width = std::min<int64_t>(args.k, kPairPassK);
    const Pass pass = policy.num_splits > 1
                          ? Pass{args.partial, args.in.total_x() * width, width, first, count}
                          : Pass{reinterpret_cast<uint64_t*>(args.idx) + first, 0, args.k, first, count};
    const int error = args.k == 1 ? launch_pass<KeepNearest>(args, policy, pass, stream)
                                  : launch_pass<KeepLists>(args, policy, pass, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace tokred
