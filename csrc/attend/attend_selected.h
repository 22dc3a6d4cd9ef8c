// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"

namespace tokred {

// One launch of K or V, dense or paged: row (batch, kv head, slot) starts at
// data + batch * stride_batch + kv_head * stride_head + (slot >> page_shift) * stride_page + (slot & mask) *
// stride_token. Dense storage is one page of 2^31 tokens per batch entry; pages belong to no batch entry.
struct KvTensor {
  const void* data = nullptr;  // [batch_size, num_kv_heads, kv_len, dim] or [num_pages, page_size, num_kv_heads, dim]
  int64_t dim = 0;
  int64_t stride_batch = 0, stride_head = 0, stride_page = 0, stride_token = 0;  // in elements

  TOKRED_HOST_DEVICE int64_t head_offset(int64_t batch_idx, int64_t kv_head) const {
    return batch_idx * stride_batch + kv_head * stride_head;
  }
  TOKRED_HOST_DEVICE int64_t slot_offset(int32_t slot, int page_shift) const {
    const int32_t in_page = slot & static_cast<int32_t>((uint32_t{1} << page_shift) - 1);
    return static_cast<int64_t>(slot >> page_shift) * stride_page + int64_t{in_page} * stride_token;
  }
};

constexpr int kDensePageShift = 31;

struct AttendSelectedArgs {
  const void* q;  // [batch_size, num_q_heads, q_len, k.dim], last dim contiguous
  KvTensor k, v;
  IndexPtr kept_idx;          // [batch_size, list_heads, num_listed], contiguous, logical positions
  const int32_t* page_table;  // [batch_size, max_pages]; null: dense
  const int32_t* kv_lens;     // [batch_size]; null: kv_len each
  const float* key_bias;      // [batch_size, bias_heads, kv_len]; null: none
  void* out;                  // [batch_size, num_q_heads, q_len, v.dim], last dim contiguous
  float* lse;                 // [batch_size, num_q_heads, q_len], contiguous
  float* partial;             // CUDA: [batch_size * num_q_heads * q_len, num_splits, v.dim + 2]; null for one split
  int64_t batch_size, num_q_heads, num_kv_heads, q_len;
  int64_t kv_len;                  // positions that a list may name: max_pages * page_size when paged
  int64_t list_heads, bias_heads;  // num_q_heads, num_kv_heads or 1
  int64_t num_listed;
  int64_t num_pages, max_pages;
  int64_t q_batch, q_head, q_token;  // strides in elements
  int64_t out_batch, out_head, out_token;
  int64_t bias_batch, bias_head;
  int page_shift;  // log2(page_size), kDensePageShift when dense
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
  if (!a.page_table) return static_cast<int32_t>(position);
  const int64_t page = a.page_table[batch_idx * a.max_pages + (position >> a.page_shift)];
  if (page < 0 || page >= a.num_pages) return -1;
  return static_cast<int32_t>((page << a.page_shift) + (position & ((int64_t{1} << a.page_shift) - 1)));
}

TOKRED_HOST_DEVICE int64_t attend_limit(const AttendSelectedArgs& a, int64_t batch_idx) {
  if (!a.kv_lens) return a.kv_len;
  const int64_t len = a.kv_lens[batch_idx];
  return len < a.kv_len ? len : a.kv_len;
}

void attend_selected_cpu(const AttendSelectedArgs& args);
int attend_selected_cuda(const AttendSelectedArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
