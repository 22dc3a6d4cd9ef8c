// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/copy_rows.h"
#include "common/dispatch.h"

namespace tokred {

struct SegmentExpandArgs {
  RowTensor rows;    // src: y [batch_size, num_out, dim]; dst: [batch_size, num_tokens, dim]
  IndexPtr dst_idx;  // [batch_size, num_tokens]; outside [0, num_out): a row of zeros
  int64_t batch_size, num_tokens, num_out;
};

// The row of y that a token copies, or -1.
struct SegmentExpandSource {
  IndexPtr dst_idx;
  int64_t num_tokens, num_out;

  TOKRED_HOST_DEVICE int64_t operator()(int64_t batch_idx, int64_t, int64_t token_idx) const {
    const int64_t dst = dst_idx[batch_idx * num_tokens + token_idx];
    return dst >= 0 && dst < num_out ? dst : -1;
  }
};

void segment_expand_cpu(const SegmentExpandArgs& args);
int segment_expand_cuda(const SegmentExpandArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
