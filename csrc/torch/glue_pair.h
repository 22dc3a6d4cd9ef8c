// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// What the bindings of ops over pairs of rows share: the checks of both sets and of who meets whom.
#pragma once
#include "common/pair.h"
#include "torch/glue.h"

namespace tokred {

// Who meets whom, and how similar they are.
struct PairOptions {
  const OptTensor &drop_mask, &x_group, &y_group;
  const std::string &metric, &group_rule;
  bool exclude_self;
};

// A shape without the last dimension, the rows'.
std::vector<int64_t> rows_of(const Tensor& x);

// cu_x, cu_y: both or none.
PairInputs check_pair(const char* op, const Tensor& x, const Tensor& y, const Tensor* cu_x, const Tensor* cu_y,
                      const PairOptions& options);

}  // namespace tokred
