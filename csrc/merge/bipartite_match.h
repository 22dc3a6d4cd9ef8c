// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/score_key.h"

namespace tokred {

enum class MatchOrder : int8_t { kIndex, kGrouped, kScore };

// Tokens by slot, [batch_size, count]; what is no token of the row is an empty slot.
struct MatchList {
  IndexPtr token;  // data null: no list
  int64_t count, stride_batch;
};

// Slot i of the sources is token 2 i, slot j of the destinations token 2 j + 1, both counted from the first ones that
// num_protected leaves; or they are listed. The similarity of a pair is (v_i v_j + offset) weight_j, and the score of a
// source its largest similarity times weight_i.
struct BipartiteMatchArgs {
  const void* metric;             // [batch_size, num_tokens, dim], last dim contiguous
  const uint8_t* protect;         // [batch_size, num_tokens], contiguous, 0 or 1; null: none
  MatchList source, destination;  // both or none
  const float* weight;            // [batch_size, num_tokens], contiguous; null: all 1
  const int32_t* group;           // [batch_size, num_tokens]: pairs are of one group; null: all are
  const int32_t* seq_lens;        // [batch_size]: tokens of each row, the rest is absent; null: all are there
  const float* row_threshold;     // [batch_size]; null: threshold
  int64_t* dst_idx;               // [batch_size, num_tokens], -1 where a token is absent
  int64_t* match_idx;             // [batch_size, num_tokens], -1 where a token has no match
  float* score;                   // [batch_size, num_tokens], -inf where a token may not merge
  int32_t* num_kept;              // [batch_size], output rows; may be null
  uint64_t* partial;              // CUDA only: [num_splits, batch_size, slots of sources]; may be null elsewhere
  int64_t batch_size, num_tokens, dim;
  int64_t stride_batch, stride_token;  // of metric, in elements
  int64_t stride_group;                // between batch rows of group
  int64_t r, num_protected;            // 0 <= r <= slots of sources
  float eps, offset, threshold;
  bool normalize;
  bool ragged;  // sources merge while their score exceeds the threshold, r at most; else r do, as far as there are any
  MatchOrder order;
  DType dtype;  // of metric
};

// A batch row: its tokens, and the slots of its sources and destinations.
struct BipartiteRow {
  int64_t batch_idx, len;
  int num_src, num_dst;
};
TOKRED_HOST_DEVICE constexpr BipartiteRow bipartite_row_of(const BipartiteMatchArgs& a, int64_t batch_idx,
                                                           int64_t len) {
  if (a.source.token.data) {
    return {batch_idx, len, static_cast<int>(a.source.count), static_cast<int>(a.destination.count)};
  }
  const int64_t num_src = (len + 1) / 2 - (a.num_protected + 1) / 2, num_dst = len / 2 - a.num_protected / 2;
  return {batch_idx, len, static_cast<int>(num_src < 0 ? 0 : num_src), static_cast<int>(num_dst < 0 ? 0 : num_dst)};
}
TOKRED_HOST_DEVICE BipartiteRow bipartite_row(const BipartiteMatchArgs& a, int64_t batch_idx) {
  int64_t len = a.num_tokens;
  if (a.seq_lens) {
    const int64_t given = a.seq_lens[batch_idx];
    len = given < 0 ? 0 : given < len ? given : len;
  }
  return bipartite_row_of(a, batch_idx, len);
}
// The most slots that a row has.
constexpr BipartiteRow bipartite_slots(const BipartiteMatchArgs& a) { return bipartite_row_of(a, 0, a.num_tokens); }

// The token of a slot, -1 where it is empty.
TOKRED_HOST_DEVICE int64_t listed_token(const MatchList& list, const BipartiteRow& row, int64_t slot) {
  const int64_t token = list.token[row.batch_idx * list.stride_batch + slot];
  return token >= 0 && token < row.len ? token : -1;
}
TOKRED_HOST_DEVICE int64_t source_token(const BipartiteMatchArgs& a, const BipartiteRow& row, int64_t slot) {
  return a.source.token.data ? listed_token(a.source, row, slot) : 2 * ((a.num_protected + 1) / 2 + slot);
}
TOKRED_HOST_DEVICE int64_t destination_token(const BipartiteMatchArgs& a, const BipartiteRow& row, int64_t slot) {
  return a.destination.token.data ? listed_token(a.destination, row, slot) : 2 * (a.num_protected / 2 + slot) + 1;
}

// A source's place in the order of merging: empty slots, sources that should not merge, NaN, numbers.
constexpr uint32_t kMatchEmpty = 0, kMatchBlocked = 1, kMatchNaN = 2;
TOKRED_HOST_DEVICE uint32_t match_key(float score) {
  const uint32_t key = score_key(score);
  return key == kKeyNaN ? kMatchNaN : key;
}
// The lowest key that may merge.
TOKRED_HOST_DEVICE uint32_t lowest_match_key(const BipartiteMatchArgs& a, int64_t batch_idx) {
  if (!a.ragged) return kMatchBlocked;
  const uint32_t key = score_key(a.row_threshold ? a.row_threshold[batch_idx] : a.threshold);
  return key == kKeyNaN ? kKeyForced : key + 1;
}

// Sources of a CPU task: at most 256 (they stay in a 1 MiB L2 cache up to a dim of 512), split evenly so that 289 do
// not pay for 512. A multiple of the 6 rows that meet a panel of destinations together. No bit of the result depends on
// it.
constexpr int64_t bipartite_block_rows(int64_t count) {
  const int64_t tasks = count < 1 ? 1 : ceil_div(count, int64_t{256});
  return ceil_div(ceil_div(count < 1 ? int64_t{1} : count, tasks), int64_t{6}) * 6;
}

constexpr int kBipartiteBlockSrc = 64, kBipartiteBlockDst = 128;  // of a CUDA block's tile
constexpr int kBipartiteMaxSplits = 8;
constexpr int kBipartiteNumberThreads = 1024, kBipartiteRankThreads = 256;  // at most, and exactly

struct BipartiteMatchPolicy {
  bool vector_loads;                 // 16 bytes at a time; else one value
  bool general;                      // lists, weights, an offset or groups
  int num_splits;                    // shares of the destinations, one block each; no bit of the result depends on it
  int64_t match_blocks;              // 0: nothing to match
  int number_threads, number_items;  // of the block that numbers a row; keys per thread in registers, 0: none
};
constexpr BipartiteMatchPolicy choose_policy(const BipartiteMatchArgs& a, uint64_t address) {
  const BipartiteRow slots = bipartite_slots(a);
  const uint64_t bytes = static_cast<uint64_t>(element_size(a.dtype));
  const uint64_t all = address | static_cast<uint64_t>(a.dim) * bytes | static_cast<uint64_t>(a.stride_token) * bytes |
                       static_cast<uint64_t>(a.batch_size > 1 ? a.stride_batch : 0) * bytes;
  const int64_t n = slots.num_src;
  const int64_t rows = a.batch_size * ceil_div(n, int64_t{kBipartiteBlockSrc});
  const int64_t tiles = ceil_div(int64_t{slots.num_dst}, int64_t{kBipartiteBlockDst});
  int64_t splits = 1;
  if (rows > 0 && tiles > 0) {  // about four blocks for each of 132 SMs: their unequal ends then cost little
    splits = std::min({tiles, int64_t{kBipartiteMaxSplits}, ceil_div(int64_t{4 * 132}, rows)});
  }
  const int items = n <= kBipartiteNumberThreads ? 1 : n <= 4 * kBipartiteNumberThreads ? 4 : 0;
  const int64_t threads = items == 1 ? std::max<int64_t>(ceil_div(n, int64_t{32}) * 32, 128) : kBipartiteNumberThreads;
  return {all % 16 == 0,
          a.source.token.data || a.weight || a.group || a.offset != 0.f,
          static_cast<int>(splits),
          tiles > 0 ? rows * splits : 0,
          static_cast<int>(threads),
          items};
}

void bipartite_match_cpu(const BipartiteMatchArgs& args);
int bipartite_match_cuda(const BipartiteMatchArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
