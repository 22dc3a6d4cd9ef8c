// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: every token read and every output row written once, (num_tokens + num_out) x dim x element bytes. Destination-
// major, in two launches without float atomics: a stable counting sort of the map, then each output row gathers its
// members. Scatter-major would need one atomic per element and give other bits every time.
#include "common/block.cuh"
#include "common/launch.cuh"
#include "merge/segment_merge.h"

namespace tokred {
namespace {

template <bool kSparse>
constexpr int kIdsAhead = kSparse ? 2 : 4;  // loads of a thread in flight in kernel 1
constexpr int kMembersAhead =
    2;  // and kernel 2, times kMergePacks; more would cost a fourth block per SM (64 registers)

struct SortStorage {
  BlockScratch scratch;
};  // tail: int32 counters [sort_warps][segments of the range]

// Calls body(ids, first) for groups of kIdsAhead<kSparse> x 32 tokens of [begin, end): ids[g] is the segment of token
// first + 32 g + lane counted from the range's first one, and out of [0, INT32_MAX) where there is none.
template <bool kSparse, typename Body>
__device__ inline void warp_for_tokens(const SegmentMergeArgs& a, int64_t row_start, int begin, int end,
                                       const Body& body) {
  for (int first = begin; first < end; first += kIdsAhead<kSparse> * kWarpSize) {
    int64_t ids[kIdsAhead<kSparse>];
#pragma unroll
    for (int g = 0; g < kIdsAhead<kSparse>; ++g) {
      const int token_idx = first + g * kWarpSize + lane_index();
      if (token_idx >= end) {
        ids[g] = -1;
      } else if constexpr (kSparse) {
        ids[g] = a.segment_of(row_start + token_idx);
      } else {
        ids[g] = a.dst_idx[row_start + token_idx];
      }
    }
    body(ids, first);
  }
}

// One block: the tokens of one batch row that go to one range of segments. A block reads the row's whole map, and
// counts the tokens of the ranges below, too, so that no block waits for another. Each warp owns a contiguous share of
// the tokens and a counter per segment: the order is that of the shares, and within a warp that of the lanes.
template <bool kSparse>
__global__ void __launch_bounds__(512)
    sort_tokens_kernel(const SegmentMergeArgs a, int segments_per_sort, int num_ranges) {
  TOKRED_SHARED(SortStorage, s);
  const int64_t batch_idx = blockIdx.x / static_cast<unsigned>(num_ranges);
  if (a.skip && a.skip[batch_idx]) return;  // the whole block
  const int range = static_cast<int>(blockIdx.x % static_cast<unsigned>(num_ranges));
  const int num_tokens = static_cast<int>(a.num_tokens), num_out = static_cast<int>(a.num_out);
  const int first_segment = range * segments_per_sort;
  const int num_segments = min(segments_per_sort, num_out - first_segment);
  const int num_threads = static_cast<int>(blockDim.x), num_warps = num_threads / kWarpSize;
  int* const all_counters =
      reinterpret_cast<int*>(reinterpret_cast<unsigned char*>(&s) + shared_tail_offset<SortStorage>());
  int* const counters = all_counters + warp_index() * num_segments;  // of this warp
  const int share = ceil_div(ceil_div(num_tokens, num_warps), kWarpSize) * kWarpSize;
  const int begin = min(warp_index() * share, num_tokens), end = min(begin + share, num_tokens);
  const int64_t row_start = batch_idx * a.num_tokens;

  for (int i = thread_rank(); i < num_warps * num_segments; i += num_threads) all_counters[i] = 0;
  __syncthreads();  // counters are zero
  int below = 0;
  warp_for_tokens<kSparse>(a, row_start, begin, end, [&](const int64_t (&ids)[kIdsAhead<kSparse>], int) {
#pragma unroll
    for (int g = 0; g < kIdsAhead<kSparse>; ++g) {
      const int64_t segment = ids[g] - first_segment;
      if (segment >= 0 && segment < num_segments) atomicAdd(&counters[segment], 1);
      below += ids[g] >= 0 && segment < 0;
    }
  });
  int position = block_sum(below, s.scratch);  // its barriers also publish the counters

  int32_t* const offsets = a.offsets + batch_idx * (a.num_out + 1);
  for (int base = 0; base < num_segments; base += num_threads) {
    const int segment = base + thread_rank();
    int count = 0, total;
    if (segment < num_segments) {
      for (int w = 0; w < num_warps; ++w) count += all_counters[w * num_segments + segment];
    }
    int at = position + block_exclusive_scan(count, s.scratch, &total);
    if (segment < num_segments) {
      offsets[first_segment + segment] = at;
      for (int w = 0; w < num_warps; ++w) {  // from a count to the place of the warp's next token of the segment
        int& counter = all_counters[w * num_segments + segment];
        const int here = counter;
        counter = at;
        at += here;
      }
    }
    position += total;
  }
  if (range == num_ranges - 1 && thread_rank() == 0) offsets[num_out] = position;
  __syncthreads();  // places are known

  int32_t* const order = a.order + row_start;
  warp_for_tokens<kSparse>(a, row_start, begin, end, [&](const int64_t (&ids)[kIdsAhead<kSparse>], int first) {
#pragma unroll
    for (int g = 0; g < kIdsAhead<kSparse>; ++g) {  // with every lane: first and the trip count are uniform
      const int64_t segment = ids[g] - first_segment;
      const bool mine = segment >= 0 && segment < num_segments;
      const unsigned peers = __match_any_sync(kFullMask, mine ? static_cast<int>(segment) : -1);
      const int rank = __popc(peers & ((1u << lane_index()) - 1));
      int place = 0;
      if (mine) {
        place = counters[segment] + rank;
        order[place] = first + g * kWarpSize + lane_index();
      }
      __syncwarp();  // all peers have read the counter
      if (mine && rank == __popc(peers) - 1) counters[segment] = place + 1;
      __syncwarp();  // and see it advanced
    }
  });
}

template <bool kMax>
__device__ inline float accumulate(float acc, float coef, float value) {
  if constexpr (kMax) {
    return acc < value || value != value ? value : acc;  // NaN stays: nothing is larger
  } else {
    return acc + coef * value;
  }
}

// blockDim.x threads share a chunk of an output row; every thread adds its own columns over all members, ascending. The
// loads of the members' ids and factors are the same for all of them and come from L1.
template <typename T, int kVec, bool kMax>
__global__ void __launch_bounds__(kMergeThreads, 4) merge_rows_kernel(const SegmentMergeArgs a, unsigned num_chunks) {
  const unsigned chunk = blockIdx.x % num_chunks;
  const unsigned row = blockIdx.x / num_chunks * blockDim.y + threadIdx.y;
  if (row >= static_cast<uint64_t>(a.batch_size * a.num_out)) return;  // no barrier follows
  const unsigned num_out = static_cast<unsigned>(a.num_out), batch_idx = row / num_out, segment = row % num_out;
  if (a.skip && a.skip[batch_idx]) return;  // no barrier follows
  const int32_t* const offsets = a.offsets + int64_t{batch_idx} * (a.num_out + 1) + segment;
  const int64_t row_start = batch_idx * a.num_tokens;
  const int begin = offsets[0], end = offsets[1];
  const int32_t* const order = a.order + row_start;
  const float* const factor = a.factor() ? a.factor() + row_start : nullptr;

  if (chunk == 0 && threadIdx.x == 0 && !a.sorted) {
    float size = static_cast<float>(end - begin);
    if (a.size) {
      size = 0.f;
#pragma unroll 4
      for (int m = begin; m < end; ++m) size += a.size[row_start + order[m]];
    }
    a.size_out[row] = size;
  }
  float total = 1.f;
  if (a.mode == MergeMode::kMean) {
    total = static_cast<float>(end - begin);
    if (factor) {
      total = 0.f;
#pragma unroll 4
      for (int m = begin; m < end; ++m) total += factor[order[m]];
    }
  }

  const unsigned column = (chunk * kMergePacks * blockDim.x + threadIdx.x) * kVec, step = blockDim.x * kVec;
  using Word = typename detail::Word<sizeof(T) * kVec>::type;
  bool live[kMergePacks];
  float acc[kMergePacks][kVec];
#pragma unroll
  for (int p = 0; p < kMergePacks; ++p) {
    live[p] = column + p * step < static_cast<uint64_t>(a.dim);
#pragma unroll
    for (int v = 0; v < kVec; ++v) acc[p][v] = kMax ? -INFINITY : -0.f;  // neutral: 0 + -0 would lose the sign
  }
  const T* const x = static_cast<const T*>(a.x) + batch_idx * a.stride_batch + column;
  for (int m = begin; m < end; m += kMembersAhead) {
    Word word[kMembersAhead][kMergePacks] = {};
    float weight[kMembersAhead] = {};
#pragma unroll
    for (int g = 0; g < kMembersAhead; ++g) {  // all loads first: they are in flight together
      if (m + g >= end) break;
      const int token_idx = order[m + g];
      const T* const from = x + a.source_of(batch_idx, token_idx) * a.stride_token;
#pragma unroll
      for (int p = 0; p < kMergePacks; ++p) {
        if (live[p]) word[g][p] = __ldcs(reinterpret_cast<const Word*>(from + p * step));  // as bits: halves in pairs
      }
      weight[g] = factor ? factor[token_idx] : 1.f;
    }
#pragma unroll
    for (int g = 0; g < kMembersAhead; ++g) {
      if (m + g >= end) break;
      const float coef = weight[g] / total;  // of a single member: exactly 1
#pragma unroll
      for (int p = 0; p < kMergePacks; ++p) {
        if (!live[p]) continue;
        const auto pack = detail::bits_as<Pack<T, kVec>>(word[g][p]);
#pragma unroll
        for (int v = 0; v < kVec; ++v) acc[p][v] = accumulate<kMax>(acc[p][v], coef, static_cast<float>(pack.v[v]));
      }
    }
  }

  const bool empty = begin == end || total == 0.f;
  T* const out = static_cast<T*>(a.merged) + row * a.dim + column;
#pragma unroll
  for (int p = 0; p < kMergePacks; ++p) {
    if (!live[p]) continue;
    Pack<T, kVec> pack;
#pragma unroll
    for (int v = 0; v < kVec; ++v) pack.v[v] = static_cast<T>(empty ? 0.f : acc[p][v]);
    store_pack(out + p * step, pack);
  }
}

}  // namespace

int segment_merge_cuda(const SegmentMergeArgs& a, CUstream_st* stream) {
  const int64_t rows = a.batch_size * a.num_out;
  if (rows == 0) return cudaSuccess;
  const SegmentMergePolicy p = choose_policy(a, reinterpret_cast<uint64_t>(a.x) | reinterpret_cast<uint64_t>(a.merged));
  const int64_t num_ranges = ceil_div<int64_t>(a.num_out, p.segments_per_sort);
  const int64_t element = element_size(a.dtype);
  const int64_t chunk_bytes = int64_t{p.load_bytes} * p.lanes_per_row * kMergePacks;
  const int64_t num_chunks = std::max<int64_t>(ceil_div(a.dim * element, chunk_bytes), 1);  // dim 0 still has sizes
  const dim3 block(static_cast<unsigned>(p.lanes_per_row), static_cast<unsigned>(kMergeThreads / p.lanes_per_row));
  const int64_t groups = ceil_div<int64_t>(rows, block.y);
  if (a.batch_size * num_ranges > INT32_MAX || groups * num_chunks > INT32_MAX) return cudaErrorInvalidValue;

  const size_t shared = shared_bytes_with_tail<SortStorage>(sizeof(int) * p.sort_warps * p.segments_per_sort);
  int error = cudaSuccess;
  if (!a.sorted) {
    const auto kernel = a.src_idx.data ? &sort_tokens_kernel<true> : &sort_tokens_kernel<false>;
    error = launch(kernel, dim3(static_cast<unsigned>(a.batch_size * num_ranges)),
                   dim3(static_cast<unsigned>(p.sort_warps * kWarpSize)), shared, stream, a, p.segments_per_sort,
                   static_cast<int>(num_ranges));
  }
  if (error != cudaSuccess) return error;
  dispatch_float(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWide = 16 / sizeof(T);
    const bool is_max = a.mode == MergeMode::kMax;
    const auto kernel = p.load_bytes == 16
                            ? (is_max ? &merge_rows_kernel<T, kWide, true> : &merge_rows_kernel<T, kWide, false>)
                            : (is_max ? &merge_rows_kernel<T, 1, true> : &merge_rows_kernel<T, 1, false>);
    error = launch(kernel, dim3(static_cast<unsigned>(groups * num_chunks)), block, 0, stream, a,
                   static_cast<unsigned>(num_chunks));
  });
  return error;
}

}  // namespace tokred
