// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/copy_rows.h"
#include "common/dispatch.h"

namespace tokred {

constexpr int kGatherMaxTensors = 16;  // per launch; their descriptors travel as kernel arguments

struct GatherTokensArgs {
  RowTensor tensors[kGatherMaxTensors];   // src [batch_size, heads, tokens, row], dst [batch_size, heads, k, row]
  int64_t num_tokens[kGatherMaxTensors];  // of each tensor
  int num_tensors;
  IndexPtr kept_idx;   // [batch_size, list_heads, k]; an id outside [0, num_tokens) gives a zero row
  int64_t list_heads;  // 1: the heads of every tensor share a list
  int64_t batch_size, k;
};

// The token of a slot, or -1.
TOKRED_HOST_DEVICE int64_t gather_source(const GatherTokensArgs& a, int tensor, int64_t batch, int64_t head,
                                         int64_t slot) {
  const int64_t list = a.list_heads == 1 ? batch : batch * a.list_heads + head;
  const int64_t token = a.kept_idx[list * a.k + slot];
  return token < a.num_tokens[tensor] ? token : -1;
}

void gather_tokens_cpu(const GatherTokensArgs& args);
int gather_tokens_cuda(const GatherTokensArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
