// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: scores and masks read once, 8 bytes written per kept token. The selection is common/topk_rows.cu's; a list of
// up to 4,096 tokens is completed and sorted there, while it is in shared memory. Longer lists come back here.
#include "common/launch.cuh"
#include "common/topk_rows.cuh"
#include "select/select_topk.h"

namespace tokred {
namespace {

using SortKey = unsigned long long;

// One thread per place. kept_idx ascends.
__global__ void __launch_bounds__(kSelectTopkThreads) select_topk_rest_kernel(const TopkRows args) {
  const int64_t at = int64_t{blockIdx.x} * kSelectTopkThreads + threadIdx.x;
  if (at >= args.num_rows * args.num_rest) return;
  const int64_t row_idx = at / args.num_rest, j = at - row_idx * args.num_rest;
  const int64_t* kept = args.kept_idx + row_idx * args.k;
  const int count = args.num_kept[row_idx];
  const int64_t rest = topk_span(args, row_idx / args.num_heads).len - count;
  args.rest_idx[at] = j < rest ? rest_token(j, count, [&](int i) { return kept[i]; }) : -1;
}

// One block per run of kTopkListed places of a row, which it sorts. Empty slots come last.
template <typename T>
__global__ void __launch_bounds__(kSelectTopkSortThreads)
    select_topk_sort_kernel(const TopkRows args, int runs, SortKey* out) {
  TOKRED_SHARED_BYTES(shared);
  SortKey* keys = reinterpret_cast<SortKey*>(shared);
  const int64_t row_idx = blockIdx.x / runs, first = int64_t{blockIdx.x % runs} * kTopkListed;
  const int64_t* kept = args.kept_idx + row_idx * args.k;
  const TopkRow<T> row = topk_row<T>(args, row_idx);
  const int64_t count = args.num_kept[row_idx];
  for (int i = static_cast<int>(threadIdx.x); i < kTopkListed; i += kSelectTopkSortThreads) {
    const int64_t slot = first + i;
    keys[i] = slot < count ? sort_key(score_key(static_cast<float>(row.score[kept[slot]])), kept[slot]) : kSortLast;
  }
  __syncthreads();  // the run is whole
  struct Team {
    __device__ int rank() const { return static_cast<int>(threadIdx.x); }
    __device__ int size() const { return kSelectTopkSortThreads; }
    __device__ void sync() const { __syncthreads(); }
  } team;
  team_sort(keys, kTopkListed, team);
  for (int i = static_cast<int>(threadIdx.x); i < kTopkListed && first + i < args.k; i += kSelectTopkSortThreads) {
    out[row_idx * args.k + first + i] = keys[i];
  }
}

// One thread per key: its place in the merged run is its place in its own plus the keys of the other run before it.
// The last round writes the tokens.
__global__ void __launch_bounds__(kSelectTopkThreads)
    select_topk_merge_kernel(const TopkRows args, const SortKey* in, SortKey* out, int64_t run, bool last) {
  const int64_t at = int64_t{blockIdx.x} * kSelectTopkThreads + threadIdx.x;
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
    args.kept_idx[place] = key == kSortLast ? -1 : static_cast<int64_t>(static_cast<uint32_t>(key));
  } else {
    out[place] = key;
  }
}

int sort_by_score(const TopkRows& args, SortKey* keys, CUstream_st* stream) {
  const int64_t total = args.num_rows * args.k;
  const int runs = static_cast<int>(ceil_div<int64_t>(args.k, kTopkListed));
  SortKey *from = keys, *to = keys + total;
  int error = cudaErrorInvalidValue;
  dispatch_float(args.dtype, [&](auto tag) {
    error =
        launch(select_topk_sort_kernel<typename decltype(tag)::type>, dim3(static_cast<unsigned>(args.num_rows * runs)),
               dim3(kSelectTopkSortThreads), kTopkListed * sizeof(SortKey), stream, args, runs, from);
  });
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(total, kSelectTopkThreads)));
  for (int round = select_topk_merges(args.k), run = kTopkListed; round > 0 && error == cudaSuccess;
       --round, run *= 2) {
    error = launch(select_topk_merge_kernel, grid, dim3(kSelectTopkThreads), 0, stream, args, from, to, int64_t{run},
                   round == 1);
    std::swap(from, to);
  }
  return error;
}

}  // namespace

int select_topk_cuda(const TopkRows& args, CUstream_st* stream) {
  const TopkPolicy policy = choose_policy(args);
  int error = topk_rows_cuda(args, policy, stream);
  if (error != cudaSuccess || policy.listed) return error;
  if (args.rest_idx) {
    const int64_t total = args.num_rows * args.num_rest;
    error = launch(select_topk_rest_kernel, dim3(static_cast<unsigned>(ceil_div<int64_t>(total, kSelectTopkThreads))),
                   dim3(kSelectTopkThreads), 0, stream, args);
  }
  if (error != cudaSuccess || !args.by_score) return error;
  uint32_t* keys = args.workspace + select_topk_sort_offset(policy, args.num_rows);
  return sort_by_score(args, reinterpret_cast<SortKey*>(keys), stream);
}

}  // namespace tokred
