// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Lists in order of score: tiles are sorted in shared memory, then rounds merge two runs into one.
#include "common/sort_lists.h"

#include "common/launch.cuh"
#include "common/topk_rows.cuh"

namespace tokred {
namespace {

using SortKey = unsigned long long;

__device__ inline int64_t token_of(SortKey key) {
  return key == kSortLast ? -1 : static_cast<int64_t>(static_cast<uint32_t>(key));
}

// One block per run of kTopkListed places of a row, which it sorts; size: their number, padded to a power of two. Empty
// slots come last. A row's only run is its list.
template <typename T>
__global__ void __launch_bounds__(kSortRunThreads)
    sort_run_kernel(const TopkRows args, int runs, int size, SortKey* out) {
  TOKRED_SHARED_BYTES(shared);
  SortKey* keys = reinterpret_cast<SortKey*>(shared);
  const int64_t row_idx = blockIdx.x / runs, first = int64_t{blockIdx.x % runs} * kTopkListed;
  const int64_t* kept = args.kept_idx + row_idx * args.k;
  const TopkRow<T> row = topk_row<T>(args, row_idx);
  const int64_t count = args.num_kept[row_idx];
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kSortRunThreads) {
    const int64_t slot = first + i;
    keys[i] = slot < count ? sort_key(score_key(static_cast<float>(row.score[kept[slot]])), kept[slot]) : kSortLast;
  }
  __syncthreads();  // the run is whole
  struct Team {
    __device__ int rank() const { return static_cast<int>(threadIdx.x); }
    __device__ int size() const { return kSortRunThreads; }
    __device__ void sync() const { __syncthreads(); }
  } team;
  team_sort(keys, size, team);
  for (int i = static_cast<int>(threadIdx.x); i < size && first + i < args.k; i += kSortRunThreads) {
    if (runs == 1) {
      args.kept_idx[row_idx * args.k + i] = token_of(keys[i]);
    } else {
      out[row_idx * args.k + first + i] = keys[i];
    }
  }
}

// One thread per key: its place in the merged run is its place in its own plus the keys of the other run before it.
// The last round writes the tokens.
__global__ void __launch_bounds__(kSortMergeThreads)
    sort_merge_kernel(const TopkRows args, const SortKey* in, SortKey* out, int64_t run, bool last) {
  const int64_t at = int64_t{blockIdx.x} * kSortMergeThreads + threadIdx.x;
  if (at >= args.num_rows * args.k) return;
  const int64_t row_idx = at / args.k, slot = at - row_idx * args.k, base = row_idx * args.k;
  const int64_t own = slot / run * run, pair = slot / (2 * run) * (2 * run);
  const bool left = own == pair;
  const int64_t other = left ? own + run : pair;
  const SortKey key = in[at];
  int64_t low = min(other, args.k), high = min(other + run, args.k);
  while (low < high) {  // among equal keys, which are empty slots, the left run's come first
    const int64_t middle = (low + high) / 2;
    const SortKey there = in[base + middle];
    if (left ? there < key : there <= key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t place = base + pair + (slot - own) + (low - min(other, args.k));
  if (last) {
    args.kept_idx[place] = token_of(key);
  } else {
    out[place] = key;
  }
}

}  // namespace

int sort_lists_cuda(const TopkRows& args, unsigned long long* workspace, CUstream_st* stream) {
  const int64_t total = args.num_rows * args.k;
  const int runs = static_cast<int>(ceil_div<int64_t>(args.k, kTopkListed));
  int size = 1;
  while (size < kTopkListed && size < args.k) size *= 2;
  SortKey *from = workspace, *to = workspace + total;
  int error = cudaErrorInvalidValue;
  dispatch_float(args.dtype, [&](auto tag) {
    error = launch(sort_run_kernel<typename decltype(tag)::type>, dim3(static_cast<unsigned>(args.num_rows * runs)),
                   dim3(kSortRunThreads), size * sizeof(SortKey), stream, args, runs, size, from);
  });
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(total, kSortMergeThreads)));
  int64_t run = kTopkListed;
  for (int round = sort_lists_merges(args.k); round > 0 && error == cudaSuccess; --round, run *= 2) {
    error = launch(sort_merge_kernel, grid, dim3(kSortMergeThreads), 0, stream, args, from, to, run, round == 1);
    std::swap(from, to);
  }
  return error;
}

}  // namespace tokred
