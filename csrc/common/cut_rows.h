// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Where rows of scores are cut by a rule: what select_rule and select_budget share, as plain data and the arithmetic
// that all devices do alike. Every sum is of integers, so that no order of additions and no contraction changes it.
#pragma once
#include "common/fixed_point.h"
#include "common/sort_lists.h"
#include "common/topk_rows.h"

namespace tokred {

enum class CutRule : int8_t { kThreshold, kQuantile, kIqr, kMass, kShare, kCount, kLottery };
enum class Rounding : int8_t { kFloor, kRound, kCeil };  // kRound: half to even

struct CutRows {
  TopkRows rows;  // k: length of the lists, the most a row keeps; row_k: with kCount, how many; rest_idx is not written
  CutRule rule;
  Rounding rounding;       // kShare, kLottery: of value * eligible tokens
  bool strict;             // kThreshold, kQuantile: above the number, not at it; kMass: exceed the share
  bool softmax;            // kMass, kLottery: weights are softmax(score / temperature), else the scores themselves
  double value;            // threshold; quantile; factor of the IQR; share
  const float* row_value;  // [num_rows] instead of value, clamped to where it makes sense; null: none
  int64_t min_k;
  int64_t count;      // kCount without row_k: of a group
  double exp2_scale;  // of softmax: log2(e) / temperature * 2^30
  const void* other;  // like score; tokens whose other score reaches other_value are forced; null: none
  RowStrides other_stride;
  double other_value;
  const float* row_other_value;  // [num_rows]; null: none
  IndexPtr weight;               // like score: how often kQuantile counts a token, below 0 as 0; null data: once
  RowStrides weight_stride;
  int32_t stride, offset;  // tokens offset, offset + stride, ... are forced; stride 0: none
  uint64_t seed;           // kLottery
  int64_t rows_per_group;  // rows that are cut as if they were one, the first one's tokens first; divides num_rows
  // Instead of lists, with kCount; null: not wanted.
  uint8_t* kept_mask;  // [num_rows, num_tokens] or, packed, [num_heads, num_tokens]; all forced tokens are in it
  int32_t* row_count;  // [num_rows]: how many of its group's tokens are the row's, times row_share plus row_least
  double row_share;
  int64_t row_least;
};

// ---- A row, a token

// What must be known of all tokens of a group before one can be ranked.
struct CutStats {
  int64_t eligible, forced;
  int64_t best;  // the highest key of an eligible token
};

// s reaches v (or, strictly, is above it) where the key of s is above bound. -0.0 is 0.0; nothing reaches NaN.
TOKRED_HOST_DEVICE uint32_t bound_below(double v, bool strict) {
  if (!(v == v)) return kKeyForced - 1;
  const float near = static_cast<float>(v);
  const uint32_t key = score_key(near);
  const double there = static_cast<double>(near);
  return there > v || (there == v && !strict) ? key - 1 : key;
}

template <typename T>
struct CutRow {
  TopkRow<T> row;
  const T* other;
  uint32_t other_bound;
  IndexPtr weight;
  int64_t weight_at;  // place of the row's first token in weight
  int64_t row_idx;
  float best;
  int shift;
  bool crowded;

  TOKRED_HOST_DEVICE bool forced(const CutRows& a, int token) const {
    return row.forced(token) || (other && score_key(static_cast<float>(other[token])) > other_bound) ||
           (a.stride > 0 && token >= a.offset &&
            static_cast<uint32_t>(token - a.offset) % static_cast<uint32_t>(a.stride) == 0);
  }
};

template <typename T>
TOKRED_HOST_DEVICE CutRow<T> cut_row(const CutRows& a, int64_t row_idx) {
  const int64_t batch_idx = row_idx / a.rows.num_heads, head_idx = row_idx - batch_idx * a.rows.num_heads;
  const int64_t begin = topk_span(a.rows, batch_idx).begin;
  CutRow<T> out{topk_row<T>(a.rows, row_idx), nullptr, 0, a.weight, 0, row_idx, 0.f, 0, false};
  if (a.other) {
    out.other =
        static_cast<const T*>(a.other) + batch_idx * a.other_stride.batch + head_idx * a.other_stride.head + begin;
    out.other_bound = bound_below(a.row_other_value ? a.row_other_value[row_idx] : a.other_value, a.strict);
  }
  out.weight_at = batch_idx * a.weight_stride.batch + head_idx * a.weight_stride.head + begin;
  return out;
}

// The most that the rule may keep of a group.
TOKRED_HOST_DEVICE int64_t cut_limit(const CutRows& a, int64_t group) {
  if (a.rule != CutRule::kCount) return a.rows.k;
  return a.rows.row_k.data ? topk_count(a.rows, group) : a.count;
}

// More are forced than may be kept: only they compete.
TOKRED_HOST_DEVICE bool is_crowded(const CutRows& a, int64_t group, const CutStats& stats) {
  return !a.kept_mask && stats.forced > cut_limit(a, group);
}

template <typename T>
TOKRED_HOST_DEVICE void know_stats(const CutRows& a, const CutStats& stats, CutRow<T>& row) {
  row.best = stats.best > kKeyNaN ? key_score(static_cast<uint32_t>(stats.best)) : 0.f;
  row.shift = weight_shift(row.row.num_tokens);
  row.crowded = is_crowded(a, row.row_idx / a.rows_per_group, stats);
}

// What a token is in the search for the cut.
struct CutToken {
  uint32_t key;  // kKeyExcluded: it takes no part
  int64_t mass;
  bool counted;  // it competes for a place; else only its mass matters
  bool forced;
};

template <typename T>
TOKRED_HOST_DEVICE CutToken cut_token(const CutRows& a, const CutRow<T>& row, int token) {
  if (row.row.drop && row.row.drop[token]) return {kKeyExcluded, 0, false, false};
  const bool forced = row.forced(a, token);
  const float score = static_cast<float>(row.row.score[token]);
  const uint32_t key = score_key(score);
  if (row.crowded) return {forced ? key : kKeyExcluded, 0, forced, forced};
  CutToken out{key, 0, !forced, forced};
  if (a.rule == CutRule::kMass || a.rule == CutRule::kLottery) {
    out.mass =
        a.softmax ? softmax_weight(score, row.best, a.exp2_scale, row.shift) : plain_weight(score, row.best, row.shift);
    if (a.rule == CutRule::kLottery) out.key = lottery_key(out.mass, a.seed, row.row_idx, token);
  } else if ((a.rule == CutRule::kQuantile || a.rule == CutRule::kIqr) && key > kKeyNaN) {
    const int64_t weight = row.weight.data ? row.weight[row.weight_at + token] : 1;
    out.mass = weight < 0 ? 0 : weight < INT32_MAX ? weight : INT32_MAX;
  }
  return out;
}

// Its rank when the cut is made: what is above the bound is kept, and the first ties at it.
TOKRED_HOST_DEVICE uint32_t cut_key(const CutToken& token, bool crowded) {
  return token.forced && !crowded && token.key != kKeyExcluded ? kKeyForced : token.key;
}

// ---- The plan: which ranks of the order bound the cut

struct Cut {
  uint32_t bound;
  int32_t ties;
};

// The highest key with which the keys from it on reach amount, in number or in mass.
struct CutTarget {
  int64_t amount;
  int64_t above;     // of the keys beyond the bound
  int64_t at;        // of the keys at the bound
  int64_t at_count;  // their number
  uint32_t prefix;   // of the bound, or the bound itself once it is found
  int32_t slot;      // the first target with the same prefix: they share a histogram
  int64_t by_mass;   // 0 or 1
};

constexpr int kCutTargets = 6;  // Tukey's two quartiles lie between two ranks each; and min_k and max_k
constexpr int kCutNothing = -1, kCutAll = -2;

// Of the tokens that take part in the search.
struct CutTotals {
  int64_t count, mass, positive;  // positive: that the lottery can draw
  int64_t forced_mass;
};

struct CutPlan {
  CutStats stats;
  int64_t mass;  // of all that takes part
  int32_t num_targets;
  int32_t low, high, rule;  // targets, or kCutNothing, kCutAll; rule: the first of them
  CutTarget target[kCutTargets];
};

TOKRED_HOST_DEVICE int add_target(CutPlan& plan, int64_t amount, int64_t total, bool by_mass) {
  if (amount <= 0) return kCutNothing;
  if (amount > total || (amount == total && !by_mass)) return kCutAll;
  plan.target[plan.num_targets] = {amount, 0, 0, 0, 0, 0, by_mass};
  return plan.num_targets++;
}

TOKRED_HOST_DEVICE int64_t clamp_to(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

TOKRED_HOST_DEVICE double cut_value(const CutRows& a, int64_t group) {
  const double v = a.row_value ? static_cast<double>(a.row_value[group]) : a.value;
  if (a.rule == CutRule::kThreshold || a.rule == CutRule::kIqr) return v;
  return v > 0 ? (v < 1 ? v : 1) : 0;
}

TOKRED_HOST_DEVICE void plan_cut(const CutRows& a, int64_t group, const CutTotals& totals, CutPlan& plan) {
  const int64_t limit = cut_limit(a, group), forced = plan.stats.forced;
  plan.mass = totals.mass;
  plan.num_targets = 0;
  plan.low = plan.rule = kCutNothing;
  plan.high = kCutAll;
  if (is_crowded(a, group, plan.stats)) {
    plan.rule = add_target(plan, limit, forced, false);
    return;
  }
  const int64_t high = clamp_to(limit - forced, 0, totals.count);
  const int64_t low = clamp_to(a.min_k - forced, 0, high);
  const double value = cut_value(a, group);
  if (a.rule == CutRule::kShare || a.rule == CutRule::kLottery || a.rule == CutRule::kCount) {
    int64_t count = high;
    if (a.rule != CutRule::kCount) {
      const double share = value * static_cast<double>(plan.stats.eligible);
      count = static_cast<int64_t>(a.rounding == Rounding::kFloor  ? floor(share)
                                   : a.rounding == Rounding::kCeil ? ceil(share)
                                                                   : rint(share)) -
              forced;
      if (a.rule == CutRule::kLottery && count > totals.positive) count = totals.positive;
      count = clamp_to(count, low, high);
    }
    plan.rule = add_target(plan, count, totals.count, false);
    return;
  }
  plan.low = add_target(plan, low, totals.count, false);
  plan.high = add_target(plan, high, totals.count, false);
  if (a.rule == CutRule::kMass) {
    const double share = value * static_cast<double>(totals.mass + totals.forced_mass);
    const int64_t wanted = static_cast<int64_t>(a.strict ? floor(share) + 1 : ceil(share)) - totals.forced_mass;
    plan.rule = add_target(plan, wanted, totals.mass, true);
  } else if (a.rule == CutRule::kQuantile) {
    const double place = value * static_cast<double>(totals.mass - 1);
    const int64_t rank = static_cast<int64_t>(a.strict ? floor(place) : ceil(place));
    plan.rule = totals.mass > 0 ? add_target(plan, totals.mass - rank, totals.mass, true) : kCutNothing;
  } else if (a.rule == CutRule::kIqr) {
    plan.rule = totals.mass > 0 ? plan.num_targets : kCutNothing;
    for (int64_t quarter = 1; quarter <= 3 && totals.mass > 0; quarter += 2) {
      const int64_t place = quarter * (totals.mass - 1);
      add_target(plan, totals.mass - place / 4, totals.mass, true);
      add_target(plan, totals.mass - (place + 3) / 4, totals.mass, true);
    }
  }
}

// Four times the quartile, exactly: the products are.
TOKRED_HOST_DEVICE double four_quartiles(const CutPlan& plan, int first, int64_t quarter) {
  const double rest = static_cast<double>(quarter * (plan.mass - 1) % 4);
  const double low = static_cast<double>(key_score(plan.target[first].prefix));
  const double high = static_cast<double>(key_score(plan.target[first + 1].prefix));
  return rest == 0 ? 4 * low : (4 - rest) * low + rest * high;
}

TOKRED_HOST_DEVICE Cut cut_at_target(const CutPlan& plan, int target) {
  if (target == kCutNothing) return {kKeyForced - 1, 0};
  if (target == kCutAll) return {kKeyExcluded, 0};
  const CutTarget& t = plan.target[target];
  int64_t ties = t.amount - t.above;
  if (t.by_mass) ties = ceil_div(ties, t.at / t.at_count);  // equal scores weigh the same
  return {t.prefix, static_cast<int32_t>(ties)};
}

TOKRED_HOST_DEVICE bool keeps_fewer(const Cut& a, const Cut& b) {
  return a.bound > b.bound || (a.bound == b.bound && a.ties < b.ties);
}

// All targets are found.
TOKRED_HOST_DEVICE Cut resolve_cut(const CutRows& a, int64_t group, const CutPlan& plan) {
  Cut cut{kKeyForced - 1, 0};
  const bool crowded = is_crowded(a, group, plan.stats);
  if (!crowded && a.rule == CutRule::kThreshold) {
    cut.bound = bound_below(cut_value(a, group), a.strict);
  } else if (!crowded && a.rule == CutRule::kQuantile && plan.rule >= 0) {
    const uint32_t statistic = plan.target[plan.rule].prefix;
    cut.bound = a.strict ? statistic : statistic - 1;
  } else if (!crowded && a.rule == CutRule::kIqr && plan.rule >= 0) {
    const double first = four_quartiles(plan, plan.rule, 1), third = four_quartiles(plan, plan.rule + 2, 3);
    cut.bound = bound_below(multiply_add_twice_rounded(cut_value(a, group), third - first, third) / 4, true);
  } else {
    cut = cut_at_target(plan, plan.rule);
  }
  const Cut low = cut_at_target(plan, plan.low), high = cut_at_target(plan, plan.high);
  if (keeps_fewer(cut, low)) cut = low;
  if (keeps_fewer(high, cut)) cut = high;
  return cut;
}

// Where a row's part of kept_mask begins.
TOKRED_HOST_DEVICE uint8_t* row_mask(const CutRows& a, int64_t row_idx) {
  if (!a.kept_mask || !a.rows.cu_seqlens) return a.kept_mask ? a.kept_mask + row_idx * a.rows.num_tokens : nullptr;
  const int64_t batch_idx = row_idx / a.rows.num_heads, head_idx = row_idx - batch_idx * a.rows.num_heads;
  return a.kept_mask + head_idx * a.rows.num_tokens + topk_span(a.rows, batch_idx).begin;
}

TOKRED_HOST_DEVICE int32_t row_count_of(const CutRows& a, int64_t count) {
  return static_cast<int32_t>(
      rint(multiply_add_twice_rounded(a.row_share, static_cast<double>(count), static_cast<double>(a.row_least))));
}

// Writes kept_idx and num_kept, or kept_mask, or row_count.
void cut_rows_cpu(const CutRows& args);

// ---- CUDA

constexpr int kCutThreads = 256;  // a thread per bin of a histogram
constexpr int kCutTokens = 8192;  // of a row that one block cuts, or of a chunk of a longer one
constexpr int kCutRounds = 4;     // of 8 bits each

// How the CUDA path cuts. Pure: a function of sizes and of what is asked for.
struct CutPolicy {
  int num_chunks;  // 0: one block cuts and lists a row, in one launch
  bool searches;   // the cut depends on ranks
  bool listed;     // the list is sorted in shared memory by that block
  bool sorts;      // lists are sorted by launches of their own
};

constexpr CutPolicy choose_cut_policy(const CutRows& a) {
  const bool whole = a.rows_per_group == 1 && !a.kept_mask && !a.row_count && a.rows.max_seqlen <= kCutTokens;
  CutPolicy policy{};
  policy.num_chunks = 0;
  if (!whole)
    policy.num_chunks = a.rows.max_seqlen > 0 ? static_cast<int>(ceil_div<int64_t>(a.rows.max_seqlen, kCutTokens)) : 1;
  policy.searches = a.rule != CutRule::kThreshold || a.min_k > 0 || a.rows.k < a.rows.max_seqlen;
  policy.listed = whole && a.rows.k <= kTopkListed;
  policy.sorts = a.rows.by_score && !policy.listed && !a.kept_mask && !a.row_count;
  return policy;
}

struct CutHistogram {
  unsigned long long mass[kCutTargets][kCutThreads];
  unsigned long long forced_mass;
  unsigned count[kCutTargets][kCutThreads];
};

// Of a group in the workspace: a histogram per round, and the plan before each.
struct CutGroup {
  CutHistogram histogram[kCutRounds];
  CutPlan plan[kCutRounds];
  Cut cut;
};
// Of a chunk.
struct CutChunk {
  CutStats stats;
  int32_t above, ties;  // tokens beyond the cut, at its bound
};

// In bytes: groups, chunks, then what sorting needs.
constexpr int64_t cut_chunks_offset(const CutRows& a) {
  return a.rows.num_rows / a.rows_per_group * static_cast<int64_t>(sizeof(CutGroup));
}
constexpr int64_t cut_sort_offset(const CutRows& a, const CutPolicy& policy) {
  return policy.num_chunks == 0
             ? 0
             : cut_chunks_offset(a) + a.rows.num_rows * policy.num_chunks * static_cast<int64_t>(sizeof(CutChunk));
}
constexpr int64_t cut_workspace_bytes(const CutRows& a, const CutPolicy& policy) {
  return cut_sort_offset(a, policy) + (policy.sorts ? sort_lists_bytes(a.rows.num_rows, a.rows.k) : 0);
}

// Adds the launches of such a cut.
void plan_cut_rows(Plan& plan, const CutRows& args);

int cut_rows_cuda(const CutRows& args, CUstream_st* stream);  // workspace: args.rows.workspace; returns a cudaError_t

}  // namespace tokred
