// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Checks of tensors whose rows are moved by index lists: gathered, scattered, pruned, packed.
#pragma once
#include "common/copy_rows.h"
#include "torch/glue.h"

namespace tokred {

// x as the source of rows, with its token dimension at dim: 0 [tokens, ...], 1 [batch, tokens, ...] or 2 [batch, heads,
// tokens, ...]. What follows is the row, which must be contiguous.
RowTensor check_rows(const char* op, const std::string& name, const Tensor& x, int64_t dim);

// kept_idx: [batch_size, k], or [batch_size, num_heads, k] for a list per head.
IndexPtr check_lists(const char* op, const Tensor& kept_idx);

// check_rows of a tensor that has the lists' batch and, for lists per head, their heads; dim is 1 or 2. tokens is what
// its token dimension is called.
RowTensor check_listed_rows(const char* op, const std::string& name, const Tensor& x, int64_t dim, const char* tokens,
                            const Tensor& kept_idx);

// The shape of x with count in place of dimension dim.
std::vector<int64_t> with_tokens(const Tensor& x, int64_t dim, int64_t count);

// An out tensor of that shape and the dtype of like, contiguous, on the device of kept_idx.
void check_out(const char* op, const std::string& name, const Tensor& out, const std::vector<int64_t>& shape,
               const char* meaning, const Tensor& like, const Tensor& kept_idx);

}  // namespace tokred
