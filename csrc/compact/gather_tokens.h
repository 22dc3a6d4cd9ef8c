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
  IndexPtr kept_idx;   // [batch_size, list_heads, list_len]; an id outside the tokens it may name gives a zero row
  int64_t list_heads;  // 1: the heads of every tensor share a list
  int64_t list_len;
  int64_t keep_first,
      keep_last;          // tokens at both ends that are kept around the listed ones; ids count from keep_first on
  int64_t batch_size, k;  // k = keep_first + list_len + keep_last
};

// The token of a slot, or a negative number. kSpans: keep_first or keep_last is not 0.
template <bool kSpans>
TOKRED_HOST_DEVICE int64_t gather_source(const GatherTokensArgs& a, int tensor, int64_t batch, int64_t head,
                                         int64_t slot) {
  const int64_t list = a.list_heads == 1 ? batch : batch * a.list_heads + head;
  if constexpr (kSpans) {
    if (slot < a.keep_first) return slot;
    slot -= a.keep_first;
    if (slot >= a.list_len) return a.num_tokens[tensor] - a.keep_last + slot - a.list_len;
    const int64_t token = a.kept_idx[list * a.list_len + slot];
    const bool inside = token >= 0 && token < a.num_tokens[tensor] - a.keep_first - a.keep_last;
    return inside ? token + a.keep_first : -1;
  }
  const int64_t token = a.kept_idx[list * a.list_len + slot];
  return token < a.num_tokens[tensor] ? token : -1;
}

void gather_tokens_cpu(const GatherTokensArgs& args);
int gather_tokens_cuda(const GatherTokensArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
