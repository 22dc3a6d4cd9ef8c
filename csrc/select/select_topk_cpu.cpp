// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_topk.h"

namespace tokred {

void select_topk_cpu(const TopkRows& args) { topk_rows_cpu(args); }

}  // namespace tokred
