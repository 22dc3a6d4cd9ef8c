// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"

namespace tokred {

enum class MergeMode : int8_t { kMean, kSum, kMax };

struct SegmentMergeArgs {
  const void* x;        // [batch_size, num_sources, dim], dim contiguous
  IndexPtr dst_idx;     // [batch_size, num_tokens]; outside [0, num_out): dropped
  IndexPtr src_idx;     // [batch_size, num_tokens]: the row of x; outside [0, num_sources): dropped. Null: its own
  const float* weight;  // [batch_size, num_tokens]; null: size in a mean, else 1
  const float* size;    // [batch_size, num_tokens]; null: 1
  void* merged;         // [batch_size, num_out, dim], contiguous
  float* size_out;      // [batch_size, num_out]
  int32_t*
      offsets;     // [batch_size, num_out + 1], scratch: segment j of a row has members order[offsets[j]..offsets[j+1])
  int32_t* order;  // [batch_size, num_tokens], scratch: tokens by segment, ascending in each
  const int32_t* skip;  // [batch_size], not 0: nothing of the row is read or written; null: none
  int64_t batch_size, num_tokens, num_out, dim;
  int64_t num_sources;                 // num_tokens, unless src_idx says which rows
  int64_t stride_batch, stride_token;  // of x, in elements
  DType dtype;                         // of x and merged
  MergeMode mode;
  bool sorted;  // offsets, order and size_out are there, from a call with the same map

  // The output row of a token, which is counted over all batch rows; -1: none.
  TOKRED_HOST_DEVICE int64_t segment_of(int64_t token_idx) const {
    if (!src_idx.data) return dst_idx[token_idx];
    const int64_t source = src_idx[token_idx];
    return source >= 0 && source < num_sources ? dst_idx[token_idx] : -1;
  }
  // The row of x of a token that has an output row.
  TOKRED_HOST_DEVICE int64_t source_of(int64_t batch_idx, int64_t token_idx) const {
    return src_idx.data ? src_idx[batch_idx * num_tokens + token_idx] : token_idx;
  }
  // What a token counts for in the sum or mean; null: 1.
  TOKRED_HOST_DEVICE const float* factor() const { return weight || mode != MergeMode::kMean ? weight : size; }
};

struct SegmentMergePolicy {
  // Kernel 1: one block sorts the tokens of one batch row that go to one range of segments.
  int sort_warps;         // each counts a contiguous share of the tokens on its own
  int segments_per_sort;  // sort_warps x segments_per_sort counters fill at most 64 KiB of shared memory
  // Kernel 2: lanes_per_row threads share an output row (or a chunk of it), each with kMergePacks packs of load_bytes.
  int load_bytes;
  int lanes_per_row;
};

constexpr int kMergeThreads = 256;  // of a block of kernel 2
constexpr int kMergePacks = 2;      // packs per thread: the lookup of a member is paid once for 32 bytes
constexpr int kSortCounters = 16384;

// Pure. address: x and merged, or-ed together.
constexpr SegmentMergePolicy choose_policy(const SegmentMergeArgs& a, uint64_t address) {
  SegmentMergePolicy p{};
  p.sort_warps = static_cast<int>(std::clamp<int64_t>(ceil_div<int64_t>(a.num_tokens, 64), 1, 16));
  p.segments_per_sort =
      static_cast<int>(std::clamp<int64_t>(a.num_out, 1, std::min(kSortCounters / p.sort_warps, 4096)));
  const int64_t element = element_size(a.dtype);
  const uint64_t all = address | static_cast<uint64_t>((a.dim | a.stride_batch | a.stride_token) * element);
  p.load_bytes = all % 16 == 0 ? 16 : static_cast<int>(element);
  const int64_t packs = ceil_div<int64_t>(a.dim * element, p.load_bytes);
  p.lanes_per_row = 1;
  while (p.lanes_per_row < kMergeThreads && p.lanes_per_row * kMergePacks < packs) p.lanes_per_row *= 2;
  // A last chunk that is mostly empty wastes its lanes: 80 packs are five chunks of 16, not one of 128.
  while (p.lanes_per_row > 8) {
    const int64_t chunk = p.lanes_per_row * kMergePacks;
    if (ceil_div(packs, chunk) * chunk * 7 <= packs * 8) break;  // at most an eighth is idle
    p.lanes_per_row /= 2;
  }
  return p;
}

void segment_merge_cpu(const SegmentMergeArgs& args);
int segment_merge_cuda(const SegmentMergeArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
