// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Sequences of different lengths, one after the other in a packed tensor.
#pragma once
#include "common/dispatch.h"

namespace tokred {

// Tokens [begin, begin + len) of a packed tensor.
struct TokenSpan {
  int64_t begin, len;
};

// The tokens of one sequence, max_seqlen at most, clipped so that a bad cu_seqlens reads nothing out of bounds. Dense
// (cu_seqlens null): all num_tokens tokens, from 0.
TOKRED_HOST_DEVICE TokenSpan token_span(const int32_t* cu_seqlens, int64_t num_tokens, int64_t max_seqlen,
                                        int64_t batch_idx) {
  if (!cu_seqlens) return {0, num_tokens};
  int64_t begin = cu_seqlens[batch_idx], end = cu_seqlens[batch_idx + 1];
  begin = begin < 0 ? 0 : begin;
  end = end > num_tokens ? num_tokens : end;
  if (end > begin + max_seqlen) end = begin + max_seqlen;
  return {begin, end > begin ? end - begin : 0};
}

}  // namespace tokred
