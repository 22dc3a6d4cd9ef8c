// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// What a team does with one row of a TopkRows: select, complete, order, write. All functions are called by all threads
// of the team.
#pragma once

#include "common/score_key.h"
#include "common/sort.cuh"
#include "common/topk.cuh"
#include "common/topk_rows.h"

namespace tokred {

template <typename T>
__device__ inline uint32_t token_key(const TopkRow<T>& row, int token, bool crowded) {
  if (row.drop && row.drop[token]) return kKeyExcluded;
  const bool forced = row.forced(token);
  if (crowded && !forced) return kKeyExcluded;
  if (forced && !crowded) return kKeyForced;
  return score_key(static_cast<float>(row.score[token]));
}

// What must be known of a row's masks before it can be ranked: how many tokens may be kept, and whether more than k are
// forced (then only they compete).
struct TopkEligible {
  int count;
  bool crowded;
};
template <typename T, typename Team>
__device__ inline TopkEligible row_eligible(const TopkRow<T>& row, int k, Team& team) {
  int count[3] = {row.num_window(), row.num_tokens, 0};  // forced, eligible
  if (row.keep || row.drop) {
    count[0] = count[1] = 0;
    for (int token = team.rank(); token < row.num_tokens; token += team.size()) {
      const bool in = !(row.drop && row.drop[token]);
      count[0] += in && row.forced(token);
      count[1] += in;
    }
    team.sum(count);
  }
  return count[0] > k ? TopkEligible{count[0], true} : TopkEligible{count[1], false};
}

// Calls emit(slot, token) for the kept tokens of a row, wanted at most; returns how many there are. kItems 0 streams
// the row.
template <typename T, int kItems, typename Team, typename Emit>
__device__ inline int select_in_row(const TopkRow<T>& row, int wanted, Team& team, Emit&& emit) {
  const TopkEligible eligible = row_eligible(row, wanted, team);
  const int k = min(wanted, eligible.count);
  if (k == 0) return 0;  // the same in the whole team
  const auto key_at = [&](int token) { return token_key(row, token, eligible.crowded); };
  if constexpr (kItems > 0) {
    return topk_emit(register_keys<kItems>(team, row.num_tokens, key_at), k, team, emit);
  } else {
    return topk_emit(StreamKeys<decltype(key_at)>{key_at, row.num_tokens}, k, team, emit);
  }
}
template <typename T, int kItems, typename Team, typename Emit>
__device__ inline int select_row(const TopkRows& args, int64_t row_idx, Team& team, Emit&& emit) {
  return select_in_row<T, kItems>(topk_row<T>(args, row_idx), static_cast<int>(topk_count(args, row_idx)), team, emit);
}

// The token at place j of those that are not among the ascending kept_at(0 .. count - 1): j plus the number of kept
// tokens before it.
template <typename KeptAt>
__device__ inline int64_t rest_token(int64_t j, int count, KeptAt&& kept_at) {
  int low = 0, high = count;  // how many kept tokens come before it
  while (low < high) {
    const int middle = (low + high) / 2;
    if (kept_at(middle) - middle > j) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return j + low;
}

// A row's list on its way out: in shared memory, ascending, or null if its tokens went straight to kept_idx.
using TopkList = unsigned long long*;

__device__ inline void write_kept(const TopkRows& args, int64_t row_idx, TopkList list, int slot, int token) {
  if (list) {
    list[slot] = static_cast<unsigned>(token);
  } else {
    args.kept_idx[row_idx * args.k + slot] = token;
  }
}

template <typename T, typename Team>
__device__ inline void finish_row(const TopkRows& args, int64_t row_idx, int count, TopkList list, Team& team) {
  int64_t* kept = args.kept_idx + row_idx * args.k;
  if (list) {
    const TopkRow<T> row = topk_row<T>(args, row_idx);
    team.sync();  // the list is whole
    if (args.rest_idx) {
      const int64_t rest = row.num_tokens - count;
      for (int64_t j = team.rank(); j < args.num_rest; j += team.size()) {
        args.rest_idx[row_idx * args.num_rest + j] =
            j < rest ? rest_token(j, count, [&](int i) { return static_cast<int64_t>(list[i]); }) : -1;
      }
    }
    if (args.by_score) {
      int size = 1;
      while (size < count) size *= 2;
      team.sync();  // the list was read for the rest
      for (int slot = team.rank(); slot < size; slot += team.size()) {
        list[slot] = slot < count ? sort_key(score_key(static_cast<float>(row.score[list[slot]])),
                                             static_cast<int64_t>(list[slot]))
                                  : kSortLast;
      }
      team.sync();  // all keys are written
      team_sort(list, size, team);
    }
    for (int slot = team.rank(); slot < count; slot += team.size()) kept[slot] = static_cast<uint32_t>(list[slot]);
  }
  for (int64_t slot = count + team.rank(); slot < args.k; slot += team.size()) kept[slot] = -1;
  if (args.num_kept && team.rank() == 0) args.num_kept[row_idx] = count;
}

}  // namespace tokred
