// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/copy_rows.h"
#include "common/dispatch.h"

namespace tokred {

constexpr int kPackMaxTensors = 16;  // per launch; their descriptors travel as kernel arguments

// src [batch_size, num_tokens, row] by strides, or [total_tokens, row]; dst [max_total, row].
struct PackTensor : RowTensor {
  int32_t rows_per_batch = 0;  // num_tokens; 0: all rows lie src_token apart
};

struct PackTokensArgs {
  PackTensor tensors[kPackMaxTensors];
  int num_tensors;
  const uint8_t* mask;        // [total_tokens], 0 or 1
  const int32_t* cu_seqlens;  // [batch_size + 1]; null: sequences of num_tokens
  int64_t batch_size, num_tokens, total_tokens, max_total;
  int64_t* kept_rows;        // [max_total], ascending, then -1
  int32_t* cu_seqlens_kept;  // [batch_size + 1], max_total at most
  int32_t* num_kept;         // [batch_size]
  bool rows_known;           // an earlier call has written these three
  int32_t* chunk_counts;     // CUDA: [pack_chunks(total_tokens).count]
};

// Where sequence b starts in the mask; b = batch_size: where the last one ends. Inside the mask whatever cu_seqlens
// says.
TOKRED_HOST_DEVICE int64_t pack_start(const PackTokensArgs& a, int64_t b) {
  const int64_t start = a.cu_seqlens ? int64_t{a.cu_seqlens[b]} : b * a.num_tokens;
  return start < 0 ? 0 : start > a.total_tokens ? a.total_tokens : start;
}

// The row of t that a slot takes, or null for zeros.
TOKRED_HOST_DEVICE const char* pack_source(const PackTensor& t, int64_t row) {
  if (row < 0) return nullptr;
  if (t.rows_per_batch == 0) return t.src + row * t.src_token;
  const uint32_t batch = static_cast<uint32_t>(row) / static_cast<uint32_t>(t.rows_per_batch);
  return t.src + batch * t.src_batch + (row - int64_t{batch} * t.rows_per_batch) * t.src_token;
}

// CUDA: the parts of the mask that are counted by a block each.
constexpr int kPackThreads = 256, kPackItems = 16, kPackTile = kPackThreads * kPackItems, kPackMaxChunks = 1024;
struct PackChunks {
  int count;       // 1 at least
  int64_t tokens;  // of a chunk; whole tiles
};
constexpr PackChunks pack_chunks(int64_t total_tokens) {
  const int64_t tiles = total_tokens > kPackTile ? ceil_div<int64_t>(total_tokens, kPackTile) : 1;
  const int64_t of_chunk = ceil_div<int64_t>(tiles, kPackMaxChunks);
  return {static_cast<int>(ceil_div(tiles, of_chunk)), of_chunk * kPackTile};
}

void pack_tokens_cpu(const PackTokensArgs& args);
int pack_tokens_cuda(const PackTokensArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
