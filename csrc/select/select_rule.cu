// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: scores and masks read once, 8 bytes written per slot of the lists. The cut is common/cut_rows.cu's.
#include "select/select_rule.h"

namespace tokred {

int select_rule_cuda(const CutRows& args, CUstream_st* stream) { return cut_rows_cuda(args, stream); }

}  // namespace tokred
