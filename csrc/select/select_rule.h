// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/cut_rows.h"

namespace tokred {

inline CutPolicy choose_policy(const CutRows& a) { return choose_cut_policy(a); }

void select_rule_cpu(const CutRows& args);
int select_rule_cuda(const CutRows& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
