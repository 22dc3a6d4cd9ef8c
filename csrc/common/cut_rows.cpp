// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Tokens are ranked once, into arrays; a target is found by a histogram of the upper 8 bits of the keys, then by the
// next 8 bits of the tokens in its bin, and so on: few are left after the second.
#include "common/cut_rows.h"

#include <algorithm>
#include <cstring>

#include "common/plan.h"
#include "common/topk.h"

namespace tokred {
namespace {

constexpr int kBins = 256;

struct Bin {
  int64_t count, mass;
};

// A group's tokens. Those that take no part are at 0, mass 0, not counted.
struct Ranked {
  Ranked(int64_t capacity, int64_t longest)
      : key(capacity), mass(capacity), counted(capacity), forced(capacity), some(capacity), none(longest) {
    std::memset(none.data(), 0, longest);
  }
  AlignedBuffer<uint32_t> key;
  AlignedBuffer<int64_t> mass;
  AlignedBuffer<uint8_t> counted, forced;
  AlignedBuffer<int32_t> some;  // tokens whose key starts like the bound
  AlignedBuffer<uint8_t> none;  // a mask of nothing
};

// Whether tokens are forced and excluded by masks and windows alone: then the loops below do, which are vector code.
template <typename T>
bool is_simple(const CutRows& a, const CutRow<T>& row) {
  return !row.other && a.stride == 0 && a.rule != CutRule::kLottery && !row.weight.data;
}

struct Masks {
  const uint8_t *keep, *drop;  // [num_tokens], never null
  int32_t keep_before, keep_from;
};

template <typename T>
TOKRED_CLONES void simple_stats(const T* score, int32_t n, Masks masks, int32_t* eligible, int32_t* forced,
                                uint32_t* best) {
  int32_t num_eligible = 0, num_forced = 0;
  uint32_t highest = 0;
  for (int32_t i = 0; i < n; ++i) {
    const uint32_t in = masks.drop[i] ^ 1u;
    num_eligible += static_cast<int32_t>(in);
    num_forced += static_cast<int32_t>(in & (masks.keep[i] | (i < masks.keep_before) | (i >= masks.keep_from)));
    const uint32_t key = in * score_key(static_cast<float>(score[i]));
    highest = key > highest ? key : highest;
  }
  *eligible = num_eligible;
  *forced = num_forced;
  *best = highest;
}
template <typename T>
TOKRED_CLONES void simple_keys(const T* score, int32_t n, Masks masks, uint32_t* keys, uint8_t* forced,
                               uint8_t* counted) {
  for (int32_t i = 0; i < n; ++i) {
    const uint32_t in = masks.drop[i] ^ 1u;
    const uint32_t force = in & (masks.keep[i] | (i < masks.keep_before) | (i >= masks.keep_from));
    keys[i] = in * score_key(static_cast<float>(score[i]));
    forced[i] = static_cast<uint8_t>(force);
    counted[i] = static_cast<uint8_t>(in ^ force);
  }
}
TOKRED_CLONES void mass_of_numbers(const uint32_t* keys, int64_t n, int64_t* mass) {
  for (int64_t i = 0; i < n; ++i) mass[i] = keys[i] > kKeyNaN;
}
template <typename T>
TOKRED_CLONES void softmax_weights(const T* score, int64_t n, float best, double exp2_scale, int shift, int64_t* mass) {
  for (int64_t i = 0; i < n; ++i) mass[i] = softmax_weight(static_cast<float>(score[i]), best, exp2_scale, shift);
}
template <typename T>
TOKRED_CLONES void plain_weights(const T* score, int64_t n, float best, int shift, int64_t* mass) {
  for (int64_t i = 0; i < n; ++i) mass[i] = plain_weight(static_cast<float>(score[i]), best, shift);
}
// Leaves the mass of what competes; returns that of what is forced.
TOKRED_CLONES int64_t split_mass(const uint8_t* forced, const uint8_t* counted, int64_t n, int64_t* mass) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    total += mass[i] * forced[i];
    mass[i] *= counted[i];
  }
  return total;
}
template <typename V>
TOKRED_CLONES int64_t sum_of(const V* values, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

template <typename T>
Masks masks_of(const TopkRow<T>& row, const Ranked& ranked) {
  const uint8_t* none = ranked.none.data();
  return {row.keep ? row.keep : none, row.drop ? row.drop : none, row.keep_before, row.keep_from};
}

template <typename T>
void add_stats(const CutRows& a, const CutRow<T>& row, const Ranked& ranked, CutStats& stats) {
  int32_t eligible = 0, forced = 0;
  uint32_t best = 0;
  if (is_simple(a, row)) {
    simple_stats(row.row.score, row.row.num_tokens, masks_of(row.row, ranked), &eligible, &forced, &best);
  } else {
    for (int token = 0; token < row.row.num_tokens; ++token) {
      if (row.row.drop && row.row.drop[token]) continue;
      ++eligible;
      forced += row.forced(a, token);
      const uint32_t key = score_key(static_cast<float>(row.row.score[token]));
      best = key > best ? key : best;
    }
  }
  stats.eligible += eligible;
  stats.forced += forced;
  stats.best = best > stats.best ? best : stats.best;
}

template <typename T>
void rank_tokens(const CutRows& a, const CutRow<T>& row, int64_t base, Ranked& ranked, CutTotals& totals) {
  const int32_t n = row.row.num_tokens;
  uint32_t* const key = ranked.key.data() + base;
  int64_t* const mass = ranked.mass.data() + base;
  uint8_t *const forced = ranked.forced.data() + base, *const counted = ranked.counted.data() + base;
  if (is_simple(a, row) && !row.crowded) {
    simple_keys(row.row.score, n, masks_of(row.row, ranked), key, forced, counted);
    totals.count += sum_of(counted, n);
    if (a.rule == CutRule::kMass) {
      if (a.softmax) {
        softmax_weights(row.row.score, n, row.best, a.exp2_scale, row.shift, mass);
      } else {
        plain_weights(row.row.score, n, row.best, row.shift, mass);
      }
      totals.forced_mass += split_mass(forced, counted, n, mass);
    } else if (a.rule == CutRule::kQuantile || a.rule == CutRule::kIqr) {
      mass_of_numbers(key, n, mass);
    } else {
      std::fill_n(mass, n, int64_t{0});
    }
    totals.mass += sum_of(mass, n);
    return;
  }
  const bool weighs = a.rule == CutRule::kMass;
  for (int32_t token = 0; token < n; ++token) {
    const CutToken t = cut_token(a, row, token);
    key[token] = t.key;
    forced[token] = t.forced;
    counted[token] = t.counted;
    mass[token] = weighs && t.forced ? 0 : t.mass;
    if (weighs && t.forced) {
      totals.forced_mass += t.mass;
    } else {
      totals.mass += t.mass;
    }
    totals.count += t.counted;
    totals.positive += t.counted && t.key > kKeyNaN;
  }
}

// Adds the digit to the target.
void find_digit(const Bin (&bins)[kBins], CutTarget& target) {
  int digit = kBins - 1;
  for (;; --digit) {
    const int64_t in = target.by_mass ? bins[digit].mass : bins[digit].count;
    if (target.above + in >= target.amount) break;
    target.above += in;
  }
  target.prefix = target.prefix << 8 | static_cast<uint32_t>(digit);
  target.at = bins[digit].mass;
  target.at_count = bins[digit].count;
}

void find_targets(Ranked& ranked, int64_t n, CutPlan& plan) {
  if (plan.num_targets == 0) return;
  constexpr int kCopies = 4;  // neighbours often share a bin: each adds to a counter of its own
  Bin copies[kCopies][kBins] = {};
  for (int64_t i = 0; i < n; ++i) {
    Bin& bin = copies[i % kCopies][ranked.key[i] >> 24];
    bin.count += ranked.counted[i];
    bin.mass += ranked.mass[i];
  }
  Bin first[kBins] = {};
  for (const auto& copy : copies) {
    for (int b = 0; b < kBins; ++b) {
      first[b].count += copy[b].count;
      first[b].mass += copy[b].mass;
    }
  }
  for (int t = 0; t < plan.num_targets; ++t) {
    CutTarget& target = plan.target[t];
    find_digit(first, target);
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      ranked.some[left] = static_cast<int32_t>(i);
      left += ranked.key[i] >> 24 == target.prefix;
    }
    for (int shift = 16; shift >= 0; shift -= 8) {
      Bin bins[kBins] = {};
      for (int64_t j = 0; j < left; ++j) {
        const int64_t i = ranked.some[j];
        Bin& bin = bins[(ranked.key[i] >> shift) & (kBins - 1)];
        bin.count += ranked.counted[i];
        bin.mass += ranked.mass[i];
      }
      find_digit(bins, target);
      int64_t still = 0;
      for (int64_t j = 0; j < left; ++j) {
        const int32_t i = ranked.some[j];
        ranked.some[still] = i;
        still += ranked.key[i] >> shift == target.prefix;
      }
      left = still;
    }
  }
}

template <typename T>
void cut_groups(const CutRows& a, int64_t begin, int64_t end) {
  const TopkRows& rows = a.rows;
  Ranked ranked(a.rows_per_group * rows.max_seqlen, rows.max_seqlen);
  AlignedBuffer<int32_t> kept(rows.max_seqlen);
  for (int64_t group = begin; group < end; ++group) {
    CutPlan plan{};
    int64_t n = 0;
    const int64_t first = group * a.rows_per_group;
    for (int64_t r = first; r < first + a.rows_per_group; ++r) add_stats(a, cut_row<T>(a, r), ranked, plan.stats);
    CutTotals totals{};
    bool crowded = false;
    for (int64_t r = first; r < first + a.rows_per_group; ++r) {
      CutRow<T> row = cut_row<T>(a, r);
      know_stats(a, plan.stats, row);
      crowded = row.crowded;
      rank_tokens(a, row, n, ranked, totals);
      n += row.row.num_tokens;
    }
    plan_cut(a, group, totals, plan);
    find_targets(ranked, n, plan);
    Cut cut = resolve_cut(a, group, plan);
    n = 0;
    for (int64_t r = first; r < first + a.rows_per_group; ++r) {
      const TopkRow<T> row = topk_row<T>(rows, r);
      uint8_t* const mask = row_mask(a, r);
      int64_t count = 0;
      for (int32_t token = 0; token < row.num_tokens; ++token) {
        const int64_t i = n + token;
        const uint32_t key = cut_key({ranked.key[i], 0, ranked.counted[i] != 0, ranked.forced[i] != 0}, crowded);
        const bool taken = key > cut.bound || (key == cut.bound && cut.ties > 0);
        if (key == cut.bound) --cut.ties;
        if (mask) mask[token] = taken;
        kept[count] = token;
        count += taken;
      }
      n += row.num_tokens;
      if (a.row_count) a.row_count[r] = row_count_of(a, count);
      if (mask || a.row_count) continue;
      if (rows.by_score) sort_by_score(row, kept.data(), count);
      int64_t* out = rows.kept_idx + r * rows.k;
      for (int64_t slot = 0; slot < rows.k; ++slot) out[slot] = slot < count ? kept[slot] : -1;
      if (rows.num_kept) rows.num_kept[r] = static_cast<int32_t>(count);
    }
  }
}

}  // namespace

void plan_cut_rows(Plan& plan, const CutRows& args) {
  const CutPolicy policy = choose_cut_policy(args);
  const int64_t rows = args.rows.num_rows, chunks = rows * policy.num_chunks;
  if (policy.num_chunks == 0) {
    plan.launches.push_back({"cut_row", {rows}, kCutThreads});
  } else {
    plan.launches.push_back({"cut_stats", {chunks}, kCutThreads});
    for (int round = 0; round < kCutRounds && policy.searches; ++round) {
      plan.launches.push_back({"cut_round", {chunks}, kCutThreads});
    }
    plan.launches.push_back({"cut_count", {chunks}, kCutThreads});
    if (args.row_count) {
      plan.launches.push_back({"cut_row_count", {rows}, kCutThreads});
    } else {
      plan.launches.push_back({"cut_emit", {chunks}, kCutThreads});
    }
  }
  if (policy.sorts) plan_sort_lists(plan, rows, args.rows.k);
}

void cut_rows_cpu(const CutRows& args) {
  if (args.rows.num_rows == 0) return;
  // About 10 ns per token: groups are taken together until a task is worth its start.
  const int64_t grain = 1 + 4096 / (args.rows_per_group * args.rows.max_seqlen + 64);
  parallel_for(args.rows.num_rows / args.rows_per_group, grain, [&](int64_t begin, int64_t end) {
    dispatch_float(args.rows.dtype, [&](auto tag) { cut_groups<typename decltype(tag)::type>(args, begin, end); });
  });
}

}  // namespace tokred
