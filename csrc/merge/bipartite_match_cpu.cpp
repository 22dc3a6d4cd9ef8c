// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per block of sources: it meets all destinations panel by panel and keeps the best of each row, so that the
// similarities never leave the registers. Unit vectors are made while packing; protected destinations are not
// packed at all. Then one task per batch row ranks the sources and numbers the output rows.
#include "merge/bipartite_match.h"

#include <algorithm>
#include <limits>

#include "common/pair_panel.h"
#include "common/topk.h"

namespace tokred {
namespace {

// Sources of a task: they stay in a 1 MiB L2 cache up to a dim of 512. No bit of the result depends on it.
constexpr int64_t kMaxSrc = 256;
constexpr float kInf = std::numeric_limits<float>::infinity();

// The destinations that sources of a batch row may choose from, ascending, as positions after first_dst: the
// unprotected candidates, or all of them where there is none.
int64_t list_destinations(const uint8_t* protect, const BipartiteSets& sets, int32_t* list) {
  int64_t count = 0;
  for (int64_t j = 0; j < sets.candidate_dst(); ++j) {
    list[count] = static_cast<int32_t>(j);
    count += !protect[2 * (sets.first_dst + j) + 1];
  }
  if (count > 0) return count;
  for (int64_t j = 0; j < sets.candidate_dst(); ++j) list[j] = static_cast<int32_t>(j);
  return sets.candidate_dst();
}

struct MatchScratch {
  MatchScratch(int64_t src_rows, int64_t dim, int64_t max_dst)
      : pairs(src_rows, dim),
        best(padded_lanes_of(src_rows) * kVecLanes),
        score(padded_lanes_of(src_rows)),
        best_col(padded_lanes_of(src_rows) * kVecLanes),
        col(padded_lanes_of(src_rows)),
        list(max_dst + 1) {}
  PairScratch pairs;
  AlignedBuffer<float> best, score;
  AlignedBuffer<int32_t> best_col, col, list;
};

// Sources [begin, end) of one batch row.
template <typename T>
void match_block(const BipartiteMatchArgs& a, const BipartiteSets& sets, int64_t batch, int64_t begin, int64_t end,
                 MatchScratch& s) {
  const T* metric = static_cast<const T*>(a.metric) + batch * a.stride_batch;
  const uint8_t* protect = a.protect ? a.protect + batch * a.num_tokens : nullptr;
  const int64_t num_dst = protect ? list_destinations(protect, sets, s.list.data()) : sets.candidate_dst();
  const int64_t rows = end - begin, step = 2 * a.stride_token;
  const PairRows<T> src{metric + begin * step, step, nullptr, a.dim, a.normalize, a.eps};
  const PairRows<T> dst{metric + (2 * sets.first_dst + 1) * a.stride_token,
                        step,
                        protect ? s.list.data() : nullptr,
                        a.dim,
                        a.normalize,
                        a.eps};
  start_best(rows, s.best.data(), s.best_col.data());
  for_each_panel(src, rows, dst, num_dst, s.pairs, [&](const float* similarity, int64_t width, int64_t col) {
    fold_best(similarity, rows, width, static_cast<int32_t>(col), s.best.data(), s.best_col.data());
  });
  best_of_lanes(s.best.data(), s.best_col.data(), rows, s.score.data(), s.col.data());
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t col = std::max(s.col[i], 0);
    const int64_t token = 2 * (begin + i), out = batch * a.num_tokens + token;
    a.match_idx[out] = 2 * (sets.first_dst + (protect ? int64_t{s.list[col]} : col)) + 1;
    a.score[out] = protect && protect[token] ? -kInf : s.score[i];
  }
}

// Outputs of tokens that have no match: destinations and the first num_protected tokens.
void fill_unmatched(const BipartiteMatchArgs& a, const BipartiteSets& sets, int64_t batch) {
  const bool no_match = sets.candidate_dst() == 0;
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    if (token % 2 == 0 && token >= a.num_protected && !no_match) continue;
    a.match_idx[batch * a.num_tokens + token] = -1;
    a.score[batch * a.num_tokens + token] = -kInf;
  }
}

struct SelectScratch {
  explicit SelectScratch(int64_t num_src)
      : topk(num_src), drop(num_src + 1), merged(num_src + 1), picked(num_src + 32), ranked(num_src + 1) {}
  TopkScratch topk;
  AlignedBuffer<uint8_t> drop, merged;
  AlignedBuffer<int32_t> picked;
  AlignedBuffer<uint64_t> ranked;
};

// Numbers the output rows of one batch row. row_of(token) is dst_idx of that row.
void number_rows(const BipartiteMatchArgs& a, const BipartiteSets& sets, int64_t batch, SelectScratch& s) {
  int64_t* row_of = a.dst_idx + batch * a.num_tokens;
  const int64_t* match = a.match_idx + batch * a.num_tokens;
  const float* score = a.score + batch * a.num_tokens + 2 * sets.first_src;
  const uint8_t* protect = a.protect ? a.protect + batch * a.num_tokens + 2 * sets.first_src : nullptr;
  const int64_t n = sets.candidate_src();
  for (int64_t i = 0; i < n; ++i) s.drop[i] = protect ? protect[2 * i] : 0;
  const TopkRow<float> row{score, 2, nullptr, protect ? s.drop.data() : nullptr, static_cast<int32_t>(n)};
  const int64_t picked = topk_ascending(row, a.r, s.picked.data(), s.topk);
  std::fill_n(s.merged.data(), sets.num_src, uint8_t{0});
  for (int64_t i = 0; i < picked; ++i) s.merged[sets.first_src + s.picked[i]] = 1;
  for (int64_t i = 0, left = a.r - picked; left > 0; ++i) {  // too few are unprotected: the others, lowest index first
    left -= s.drop[i];
    s.merged[sets.first_src + i] |= s.drop[i];
  }

  const int64_t num_unmerged = sets.num_src - a.r;
  int64_t gone = 0;  // sources merged before this one
  for (int64_t i = 0; i < sets.num_src; ++i) {
    row_of[2 * i] = a.order == MatchOrder::kIndex ? 2 * i - gone : i - gone;
    gone += s.merged[i];
    if (i < sets.num_dst) row_of[2 * i + 1] = a.order == MatchOrder::kIndex ? 2 * i + 1 - gone : num_unmerged + i;
  }
  if (a.order == MatchOrder::kScore) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {  // descending key, then ascending index
      const uint32_t key = s.drop[i] ? kKeyExcluded : score_key(score[2 * i]);
      s.ranked[count] = uint64_t{~key} << 32 | static_cast<uint64_t>(i);
      count += !s.merged[sets.first_src + i];
    }
    std::sort(s.ranked.data(), s.ranked.data() + count);
    for (int64_t k = 0; k < count; ++k) row_of[2 * (sets.first_src + static_cast<uint32_t>(s.ranked[k]))] = k;
    for (int64_t i = 0; i < sets.first_src; ++i) row_of[2 * i] = count + i;
  }
  for (int64_t i = 0; i < sets.num_src; ++i) {
    if (s.merged[i]) row_of[2 * i] = row_of[match[2 * i]];
  }
}

}  // namespace

void bipartite_match_cpu(const BipartiteMatchArgs& args) {
  const BipartiteSets sets = bipartite_sets(args.num_tokens, args.num_protected);
  const int64_t src_rows = pair_block_rows(sets.candidate_src(), kMaxSrc);
  if (args.batch_size == 0 || args.num_tokens == 0) return;
  if (sets.candidate_src() > 0 && sets.candidate_dst() > 0) {
    const int64_t blocks = ceil_div(sets.candidate_src(), src_rows);
    parallel_for(args.batch_size * blocks, 1, [&](int64_t first, int64_t last) {
      MatchScratch scratch(src_rows, args.dim, args.protect ? sets.num_dst : 0);
      dispatch_float(args.dtype, [&](auto tag) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t begin = sets.first_src + task % blocks * src_rows;
          match_block<typename decltype(tag)::type>(args, sets, task / blocks, begin,
                                                    std::min(begin + src_rows, sets.num_src), scratch);
        }
      });
    });
  }
  // About 10 ns per source: rows are grouped until a task is worth its start.
  parallel_for(args.batch_size, 1 + 4096 / (sets.num_src + 16), [&](int64_t first, int64_t last) {
    SelectScratch scratch(sets.num_src);
    for (int64_t batch = first; batch < last; ++batch) {
      fill_unmatched(args, sets, batch);
      number_rows(args, sets, batch, scratch);
    }
  });
}

}  // namespace tokred
