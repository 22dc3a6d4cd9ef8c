// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// What the bindings of ops over rows of scores share: the checks of scores, masks and bounds, and how they become a
// TopkRows.
#pragma once
#include "common/topk_rows.h"
#include "torch/glue.h"

namespace tokred {

struct RowsCall {
  TopkRows args;
  std::vector<int64_t> lead;  // [batch_size] or [batch_size, num_heads]
  bool packed;
};

std::vector<int64_t> with_last(std::vector<int64_t> shape, int64_t last);

// The strides of [batch, head, num_tokens], of which the head and, when packed, the batch are not there.
RowStrides strides_between_rows(const Tensor& x, bool packed);

// All that follows from score and cu_seqlens.
RowsCall check_scores(const char* op, const Tensor& score, const OptTensor& cu_seqlens, int64_t max_seqlen);
// A tensor of the shape of score, on its device, contiguous in its last dimension.
void check_like_score(const char* op, const char* name, const Tensor& x, const Tensor& score);
void check_masks(const char* op, const OptTensor& keep_mask, const OptTensor& drop_mask, const Tensor& score,
                 RowsCall& call);
// The length of the lists; name: of the argument.
void check_length(const char* op, const char* name, int64_t k, const RowsCall& call);
void check_windows(const char* op, int64_t keep_first, int64_t keep_last, RowsCall& call);
void check_order(const char* op, const std::string& order, RowsCall& call);
// A contiguous tensor with one value per row; meaning as in check_shape.
void check_per_row(const char* op, const char* name, const Tensor& x, const Tensor& score, const RowsCall& call);

}  // namespace tokred
