// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: scores read once, 8 bytes written per slot of the lists. All is done by cuts of common/cut_rows.cu: of each
// head at its floor, of all heads of a sequence at their budget, of each head at what it won.
#include "select/select_budget.h"

namespace tokred {

int select_budget_cuda(const BudgetArgs& args, CUstream_st* stream) {
  return budget_steps(args, [&](const CutRows& step) { return cut_rows_cuda(step, stream); });
}

}  // namespace tokred
