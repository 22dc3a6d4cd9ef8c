// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// What the bindings of ops that select tokens and copy them share: the checks of x, its companions, masks, counts and
// bounds, and the outputs.
#pragma once
#include "common/topk_rows.h"
#include "torch/glue_rows.h"

namespace tokred {

struct PruneOptions {
  const char* op;
  const char* count_name;  // what the op calls count
  int64_t count;           // tokens to keep
  const OptTensor &keep_mask, &drop_mask, &cu_seqlens;
  int64_t max_seqlen;  // a bound of the tokens of a packed sequence
  const std::vector<Tensor>& others;
  int64_t keep_first, keep_last;
  int max_tensors;
};

struct PruneCall {
  TopkRows rows;                   // all but the scores
  std::vector<RowTensor> tensors;  // x first; dst is kept
  Tensor kept_idx;
  std::vector<Tensor> kept;
};

PruneCall check_prune(const Tensor& x, const PruneOptions& options);

// [batch_size, num_tokens], or [total_tokens] when packed: the shape of scores and masks.
std::vector<int64_t> prune_score_shape(const PruneCall& call);
const char* prune_score_meaning(const PruneCall& call);

}  // namespace tokred
