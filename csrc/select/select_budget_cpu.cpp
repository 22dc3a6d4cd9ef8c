// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_budget.h"

namespace tokred {

void select_budget_cpu(const BudgetArgs& args) {
  (void)budget_steps(args, [](const CutRows& step) {
    cut_rows_cpu(step);
    return 0;
  });
}

}  // namespace tokred
