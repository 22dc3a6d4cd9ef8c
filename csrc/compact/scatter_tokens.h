// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/copy_rows.h"
#include "common/dispatch.h"

namespace tokred {

constexpr int kScatterMaxTensors = 16;  // per launch; their descriptors travel as kernel arguments

// src [batch_size, heads, k, row], the kept rows; dst [batch_size, heads, num_tokens, row].
struct ScatterTensor : RowTensor {
  const char* base = nullptr;                             // as dst, by strides, may be dst itself; null: zeros
  int64_t base_batch = 0, base_head = 0, base_token = 0;  // strides in bytes
  DType dtype = DType::kF32;                              // of what is blended
};

// The widest copy that the base allows, too.
TOKRED_HOST_DEVICE int copy_width(const ScatterTensor& t) {
  return widest_copy(static_cast<uint64_t>(copy_width(static_cast<const RowTensor&>(t))) |
                     reinterpret_cast<uint64_t>(t.base) | uint64_t(t.base_batch) | uint64_t(t.base_head) |
                     uint64_t(t.base_token));
}

struct ScatterTokensArgs {
  ScatterTensor tensors[kScatterMaxTensors];
  int num_tensors;
  IndexPtr kept_idx;   // [batch_size, list_heads, k]; an id outside [0, num_tokens) is left out
  int32_t* slot_idx;   // [batch_size, list_heads, num_tokens]: the last slot that names each token, or -1
  bool slots_known;    // an earlier call has written slot_idx
  int64_t list_heads;  // 1: the heads of every tensor share a list
  int64_t batch_size, k, num_tokens;
  bool blend;         // a listed token gets alpha * row + beta * base; else the row
  float alpha, beta;  // with beta 0 the base is not read
};

// The slot whose row a token takes, or -1.
TOKRED_HOST_DEVICE int64_t scatter_slot(const ScatterTokensArgs& a, int64_t batch, int64_t head, int64_t token) {
  const int64_t list = a.list_heads == 1 ? batch : batch * a.list_heads + head;
  return a.slot_idx[list * a.num_tokens + token];
}
TOKRED_HOST_DEVICE const char* scatter_row(const ScatterTensor& t, int64_t batch, int64_t head, int64_t slot) {
  return t.src + batch * t.src_batch + head * t.src_head + slot * t.src_token;
}
// Null for zeros.
TOKRED_HOST_DEVICE const char* scatter_base(const ScatterTensor& t, int64_t batch, int64_t head, int64_t token) {
  return t.base ? t.base + batch * t.base_batch + head * t.base_head + token * t.base_token : nullptr;
}

void scatter_tokens_cpu(const ScatterTokensArgs& args);
int scatter_tokens_cuda(const ScatterTokensArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
