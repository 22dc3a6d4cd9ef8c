// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/sort_lists.h"

#include "common/plan.h"

namespace tokred {

void plan_sort_lists(Plan& plan, int64_t num_rows, int64_t k) {
  plan.launches.push_back({"sort", {num_rows * ceil_div<int64_t>(k, kTopkListed)}, kSortRunThreads});
  for (int round = sort_lists_merges(k); round > 0; --round) {
    plan.launches.push_back({"sort_merge", {ceil_div<int64_t>(num_rows * k, kSortMergeThreads)}, kSortMergeThreads});
  }
}

}  // namespace tokred
