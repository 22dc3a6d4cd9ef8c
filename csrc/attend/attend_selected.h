// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/kv_tensor.h"

namespace tokred {

struct AttendSelectedArgs {
  const void* q;  // [batch_size, num_q_heads, q_len, k.dim], last dim contiguous
  KvTensor k, v;
  KvPages pages;
  IndexPtr kept_idx;       // [batch_size, list_heads, num_listed], contiguous, logical positions
  const int32_t* kv_lens;  // [batch_size]; null: kv_len each
  const float* key_bias;   // [batch_size, bias_heads, kv_len]; null: none
  void* out;               // [batch_size, num_q_heads, q_len, v.dim], last dim contiguous
  float* lse;              // [batch_size, num_q_heads, q_len], contiguous
  float* partial;          // CUDA: [batch_size * num_q_heads * q_len, num_splits, v.dim + 2]; null for one split
  int64_t batch_size, num_q_heads, num_kv_heads, q_len;
  int64_t kv_len;                  // positions that a list may name: max_pages * page_size when paged
  int64_t list_heads, bias_heads;  // num_q_heads, num_kv_heads or 1
  int64_t num_listed;
  int64_t q_batch, q_head, q_token;  // strides in elements
  int64_t out_batch, out_head, out_token;
  int64_t bias_batch, bias_head;
  float scale;
  DType dtype;  // of q, k, v and out
};

// What the CUDA path may tune. All of it follows from the shapes of one batch entry, so that a row's bits do not depend
// on the rest of the batch.
struct AttendSelectedPolicy {
  int tile_dim;     // head dims are padded to this in registers and shared memory
  int64_t m_tiles;  // tiles of 16 query rows per list
  int64_t units;    // lists to walk per batch entry: kv heads, or query heads where each has its own list
  int64_t split;    // list entries of one block
  int64_t num_splits;
};

constexpr int64_t kAttendTileRows = 16;
constexpr int64_t kAttendMaxSplit = 512;

// Warps of a block: two where a padded row takes so much shared memory that four would not fit 99 KiB (sm_86, sm_89).
constexpr int attend_selected_warps(int tile_dim) { return tile_dim <= 128 ? 4 : 2; }

// Query rows that walk a list together: the group of a kv head, or one query head with a list of its own.
TOKRED_HOST_DEVICE constexpr int64_t attend_group(const AttendSelectedArgs& a) {
  return a.list_heads == a.num_q_heads ? 1 : a.num_q_heads / a.num_kv_heads;
}

// Bias rows that a tile of query rows needs: one per head it may hold, or one for all.
constexpr int attend_bias_rows(const AttendSelectedArgs& a) {
  if (!a.key_bias) return 0;
  const int64_t heads = a.bias_heads == a.num_q_heads ? attend_group(a) : 1;
  return static_cast<int>(heads < kAttendTileRows ? heads : kAttendTileRows);
}

constexpr AttendSelectedPolicy choose_policy(const AttendSelectedArgs& a) {
  AttendSelectedPolicy p{};
  const int64_t dim = a.k.dim > a.v.dim ? a.k.dim : a.v.dim;
  p.tile_dim = dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  const int64_t group = attend_group(a);
  p.units = a.num_q_heads / group;
  p.m_tiles = ceil_div(a.q_len * group, kAttendTileRows);
  // One batch entry alone should give a block to each of the 108 to 148 SMs of today's data-centre GPUs; where that is
  // so, longer splits save partial results.
  const int64_t blocks = p.units * (p.m_tiles > 0 ? p.m_tiles : 1);
  const int64_t wanted = blocks >= 128 ? 1 : ceil_div<int64_t>(128, blocks);
  p.split = ceil_div(ceil_div(a.num_listed, wanted), int64_t{64}) * 64;
  // Many bias rows leave less shared memory for entries: at most 8 KiB of bias.
  const int64_t longest = attend_bias_rows(a) > 4 ? kAttendMaxSplit / 4 : kAttendMaxSplit;
  p.split = p.split < 64 ? 64 : p.split > longest ? longest : p.split;
  p.num_splits = a.num_listed > p.split ? ceil_div(a.num_listed, p.split) : 1;
  return p;
}

// The slot of the i-th entry of a list, -1 where the entry names nothing. limit: positions of this batch entry.
TOKRED_HOST_DEVICE int32_t attend_slot(const AttendSelectedArgs& a, int64_t batch_idx, int64_t position,
                                       int64_t limit) {
  if (position < 0 || position >= limit) return -1;
  return a.pages.slot(batch_idx, position);
}

void attend_selected_cpu(const AttendSelectedArgs& args);
int attend_selected_cuda(const AttendSelectedArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
