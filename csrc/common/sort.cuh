// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Sorting of scored tokens: by falling score, ties to the lower index.
#pragma once

#include "common/topk.cuh"

namespace tokred {

constexpr unsigned long long kSortLast = ~0ull;  // behind every token: its index would be 2^32 - 1

// Ascends as the order by score does, and is unique in a row. The token is its lower half.
__device__ inline unsigned long long sort_key(uint32_t score_key, int64_t token) {
  return static_cast<unsigned long long>(~score_key) << 32 | static_cast<uint32_t>(token);
}

// Ascending, in shared memory: a bitonic network, so nothing depends on the data. size is a power of two. The keys are
// visible to the team before and after.
template <typename Team>
__device__ inline void team_sort(unsigned long long* keys, int size, Team& team) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = team.rank(); i < size / 2; i += team.size()) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const unsigned long long a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      team.sync();  // this step's pairs are whole before the next one's
    }
  }
}

}  // namespace tokred
