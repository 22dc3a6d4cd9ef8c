// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_rule.h"

namespace tokred {

void select_rule_cpu(const CutRows& args) { cut_rows_cpu(args); }

}  // namespace tokred
