// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"
#include "common/ragged.h"

namespace tokred {

struct RunMarkersArgs {
  const uint8_t* keep;        // [total_tokens], 0 or 1
  const int32_t* cu_seqlens;  // [batch_size + 1]; null: sequences of num_tokens
  uint8_t* kept_or_marker;    // [total_tokens]
  uint8_t* marker;            // [total_tokens]
  int32_t* num_runs;          // [batch_size]
  int64_t batch_size, num_tokens, total_tokens;
};

TOKRED_HOST_DEVICE TokenSpan marker_span(const RunMarkersArgs& a, int64_t b) {
  if (!a.cu_seqlens) return {b * a.num_tokens, a.num_tokens};
  return token_span(a.cu_seqlens, a.total_tokens, a.total_tokens, b);
}

void run_markers_cpu(const RunMarkersArgs& args);
int run_markers_cuda(const RunMarkersArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
