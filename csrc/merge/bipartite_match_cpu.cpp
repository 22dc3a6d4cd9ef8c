// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per block of sources: it meets all destinations panel by panel and keeps the best of each row, so that the
// similarities never leave the registers. Unit vectors are made while packing; protected destinations are not
// packed at all. Then one task per batch row ranks the sources and numbers the output rows.
#include "merge/bipartite_match.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/best_columns.h"
#include "common/dot_panel.h"
#include "common/dot_rows.h"
#include "common/topk.h"

namespace tokred {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What a pair's similarity takes beside its product.
TOKRED_CLONES void finish_pairs(float* value, int64_t rows, int64_t width, float offset, const float* dst_weight) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) value[i * width + j] = (value[i * width + j] + offset) * dst_weight[j];
  }
}
TOKRED_CLONES void part_groups(float* value, int64_t rows, int64_t width, const int32_t* src_group,
                               const int32_t* dst_group) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      if (dst_group[j] != src_group[i]) value[i * width + j] = kNaN;
    }
  }
}

// The tokens that sources of a batch row may choose from, by slot: unprotected destinations, or, where a count is kept
// whatever the mask says, all of them when there is none.
int64_t list_destinations(const BipartiteMatchArgs& a, const BipartiteRow& row, int32_t* list) {
  const uint8_t* protect = a.protect ? a.protect + row.batch_idx * a.num_tokens : nullptr;
  for (const bool all : {protect == nullptr, true}) {
    int64_t count = 0;
    for (int64_t j = 0; j < row.num_dst; ++j) {
      const int64_t token = destination_token(a, row, j);
      list[count] = static_cast<int32_t>(token);
      count += token >= 0 && (all || !protect[token]);
    }
    if (count > 0 || all || a.ragged) return count;
  }
  return 0;
}

struct MatchScratch {
  MatchScratch(int64_t src_rows, int64_t padded_depth, int64_t max_dst)  // max_dst: of a row that needs a list
      : src(src_rows * dot_stride(padded_depth)),
        dst(kMaxDotColumns * dot_stride(padded_depth)),
        panel(kMaxDotColumns * padded_depth),
        similarity(src_rows * kMaxDotColumns),
        best(padded_lanes_of(src_rows) * kVecLanes),
        score(padded_lanes_of(src_rows)),
        dst_weight(kMaxDotColumns),
        best_col(padded_lanes_of(src_rows) * kVecLanes),
        col(padded_lanes_of(src_rows)),
        list(max_dst + 1),
        src_list(src_rows),
        src_group(src_rows),
        dst_group(kMaxDotColumns) {}
  AlignedBuffer<float> src, dst, panel, similarity, best, score, dst_weight;
  AlignedBuffer<int32_t> best_col, col, list, src_list, src_group, dst_group;
};

// Slots [begin, end) of one batch row's sources: their best similarity, NaN where there is none, and its token, -1
// where there is no destination. fetch_next: the next row is about to follow.
template <typename T>
void match_block(const BipartiteMatchArgs& a, const BipartiteRow& row, int64_t begin, int64_t end, int64_t padded_depth,
                 bool fetch_next, MatchScratch& s, float* best, int32_t* match) {
  const T* metric = static_cast<const T*>(a.metric) + row.batch_idx * a.stride_batch;
  const float* weight = a.weight ? a.weight + row.batch_idx * a.num_tokens : nullptr;
  const int32_t* group = a.group ? a.group + row.batch_idx * a.num_tokens : nullptr;
  const bool listed = a.source.token.data != nullptr, choose = a.protect || listed;
  const int64_t num_dst = choose ? list_destinations(a, row, s.list.data()) : row.num_dst;
  const int64_t rows = end - begin, padded_rows = ceil_div(rows, int64_t{kDotRows}) * kDotRows;
  const int64_t stride = dot_stride(padded_depth);
  if (num_dst == 0) {
    std::fill_n(match, rows, -1);
    return;
  }
  const auto destination = [&](int64_t col) { return choose ? int64_t{s.list[col]} : destination_token(a, row, col); };
  for (int64_t i = 0; i < rows && (listed || group); ++i) {  // an empty slot has the row of some token
    s.src_list[i] = static_cast<int32_t>(std::max<int64_t>(source_token(a, row, begin + i), 0));
    if (group) s.src_group[i] = group[s.src_list[i]];
  }
  const int64_t step = listed ? a.stride_token : 2 * a.stride_token;
  pack_units(a.dtype, listed ? metric : metric + source_token(a, row, begin) * a.stride_token, step,
             listed ? s.src_list.data() : nullptr, rows, a.dim, padded_rows, padded_depth, 0.f, a.normalize, a.eps,
             s.src.data());
  start_best(rows, s.best.data(), s.best_col.data());
  for (int64_t col = 0; col < num_dst;) {
    const int64_t width = num_dst - col > kVecLanes ? dot_columns() : kVecLanes;
    const int64_t cols = std::min(width, num_dst - col);
    pack_units(a.dtype, choose ? metric : metric + destination(col) * a.stride_token, choose ? a.stride_token : step,
               choose ? s.list.data() + col : nullptr, cols, a.dim, width, padded_depth, kNaN, a.normalize, a.eps,
               s.dst.data());
    transpose_panel(s.dst.data(), stride, width, padded_depth, s.panel.data());
    // Tile by tile, each after asking for its share of the tokens that the next batch row has at these places.
    const int64_t share = fetch_next ? ceil_div(2 * cols * kDotRows, padded_rows) : 0;
    for (int64_t i = 0, token = 2 * col; i < padded_rows; i += kDotRows, token += share) {
      for (int64_t t = token; t < std::min(token + share, 2 * (col + cols)); ++t)
        prefetch(metric + a.stride_batch + t * a.stride_token, a.dim * static_cast<int64_t>(sizeof(T)));
      dot_panel(s.src.data() + i * stride, stride, kDotRows, padded_depth, s.panel.data(), width,
                s.similarity.data() + i * width);
    }
    if (weight || a.offset != 0.f) {
      for (int64_t j = 0; j < width; ++j) s.dst_weight[j] = weight && j < cols ? weight[destination(col + j)] : 1.f;
      finish_pairs(s.similarity.data(), rows, width, a.offset, s.dst_weight.data());
    }
    if (group) {
      for (int64_t j = 0; j < width; ++j) s.dst_group[j] = group[destination(col + std::min(j, cols - 1))];
      part_groups(s.similarity.data(), rows, width, s.src_group.data(), s.dst_group.data());
    }
    fold_best(s.similarity.data(), rows, width, static_cast<int32_t>(col), s.best.data(), s.best_col.data());
    col += width;
  }
  best_of_lanes(s.best.data(), s.best_col.data(), rows, s.score.data(), s.col.data());
  for (int64_t i = 0; i < rows; ++i) {
    match[i] = static_cast<int32_t>(destination(std::max(s.col[i], 0)));
    best[i] = s.score[i];
  }
}

struct SelectScratch {
  explicit SelectScratch(int64_t num_src)
      : topk(num_src),
        drop(num_src + 1),
        merged(num_src + 1),
        picked(num_src + 32),
        ranked(num_src + 1),
        token(num_src + 1) {}
  TopkScratch topk;
  AlignedBuffer<uint8_t> drop, merged;
  AlignedBuffer<int32_t> picked;
  AlignedBuffer<uint64_t> ranked;
  AlignedBuffer<int64_t> token;  // of each slot of a source
};

// Writes match_idx and score of one batch row from what its sources have found, and marks in s.drop those that cannot
// be selected. best becomes the score by slot. Returns how many may merge.
int64_t write_matches(const BipartiteMatchArgs& a, const BipartiteRow& row, float* best, const int32_t* match,
                      SelectScratch& s) {
  const int64_t first = row.batch_idx * a.num_tokens;
  const uint32_t lowest = lowest_match_key(a, row.batch_idx);
  std::fill_n(a.match_idx + first, a.num_tokens, int64_t{-1});
  std::fill_n(a.score + first, a.num_tokens, -kInf);
  int64_t count = 0;
  for (int64_t i = 0; i < row.num_src; ++i) {
    const int64_t token = s.token[i] = source_token(a, row, i);
    const bool none = token < 0 || match[i] < 0;
    const bool blocked = none || (a.protect && a.protect[first + token]) || (a.group && std::isnan(best[i]));
    s.drop[i] = blocked;
    best[i] = blocked ? -kInf : a.weight ? best[i] * a.weight[first + token] : best[i];
    count += !none && (blocked ? kMatchBlocked : match_key(best[i])) >= lowest;
    if (token < 0) continue;
    a.match_idx[first + token] = match[i];
    a.score[first + token] = best[i];
  }
  return count;
}

// Chooses the sources that merge and numbers the output rows of one batch row.
void number_rows(const BipartiteMatchArgs& a, const BipartiteRow& row, float* best, const int32_t* match,
                 SelectScratch& s) {
  int64_t* row_of = a.dst_idx + row.batch_idx * a.num_tokens;
  const int64_t n = row.num_src, num_merged = std::min(a.r, write_matches(a, row, best, match, s));
  const bool by_index = a.order == MatchOrder::kIndex, by_score = a.order == MatchOrder::kScore;
  const TopkRow<float> scores{best, 1, nullptr, s.drop.data(), static_cast<int32_t>(n)};
  const int64_t picked = topk_ascending(scores, num_merged, s.picked.data(), s.topk);
  std::fill_n(s.merged.data(), n, uint8_t{0});
  for (int64_t i = 0; i < picked; ++i) s.merged[s.picked[i]] = 1;
  for (int64_t i = 0, left = num_merged - picked; left > 0; ++i) {  // too few are free: the others, lowest slot first
    const bool taken = s.drop[i] && s.token[i] >= 0;
    left -= taken;
    s.merged[i] |= taken;
  }

  // First what a token is, then its row.
  constexpr int64_t kOther = 0, kDestination = 1, kRanked = 2, kMerged = 3;
  const bool listed = a.source.token.data != nullptr;
  int64_t num_dst = listed ? 0 : row.len / 2, num_ranked = 0;
  for (int64_t t = 0; t < a.num_tokens; ++t) row_of[t] = t >= row.len ? -1 : !listed && t % 2 ? kDestination : kOther;
  for (int64_t j = 0; listed && j < row.num_dst; ++j) {
    const int64_t token = destination_token(a, row, j);
    if (token >= 0) row_of[token] = kDestination;
    num_dst += token >= 0;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (s.token[i] < 0) continue;
    if (s.merged[i]) row_of[s.token[i]] = kMerged;
    if (s.merged[i] || !by_score) continue;
    row_of[s.token[i]] = kRanked;
    const uint32_t key = s.drop[i] ? kMatchBlocked : match_key(best[i]);
    s.ranked[num_ranked++] = uint64_t{~key} << 32 | static_cast<uint64_t>(i);  // descending key, then ascending slot
  }
  int64_t other = num_ranked, destination = row.len - num_merged - num_dst;
  for (int64_t t = 0; t < row.len; ++t) {
    const int64_t role = row_of[t];
    if (role == kOther || (role == kDestination && by_index)) row_of[t] = other++;
    if (role == kDestination && !by_index) row_of[t] = destination++;
  }
  std::sort(s.ranked.data(), s.ranked.data() + num_ranked);
  for (int64_t k = 0; k < num_ranked; ++k) row_of[s.token[static_cast<uint32_t>(s.ranked[k])]] = k;
  for (int64_t i = 0; i < n; ++i) {
    if (s.merged[i]) row_of[s.token[i]] = row_of[match[i]];
  }
  if (a.num_kept) a.num_kept[row.batch_idx] = static_cast<int32_t>(row.len - num_merged);
}

}  // namespace

void bipartite_match_cpu(const BipartiteMatchArgs& args) {
  const BipartiteRow slots = bipartite_slots(args);
  const int64_t num_src = slots.num_src, src_rows = bipartite_block_rows(num_src);
  const int64_t padded_depth = std::max<int64_t>(ceil_div<int64_t>(args.dim, kVecLanes), 1) * kVecLanes;
  if (args.batch_size == 0) return;
  AlignedBuffer<float> best(args.batch_size * num_src + 1);  // of each slot, and the token it is with
  AlignedBuffer<int32_t> match(args.batch_size * num_src + 1);
  const int64_t blocks = ceil_div(num_src, src_rows);
  parallel_for(args.batch_size * blocks, 1, [&](int64_t first, int64_t last) {
    MatchScratch scratch(src_rows, padded_depth, args.protect || args.source.token.data ? slots.num_dst : 0);
    dispatch_float(args.dtype, [&](auto tag) {
      for (int64_t task = first; task < last; ++task) {
        const BipartiteRow row = bipartite_row(args, task / blocks);
        const int64_t begin = task % blocks * src_rows, end = std::min<int64_t>(begin + src_rows, row.num_src);
        const int64_t at = row.batch_idx * num_src + begin;
        const bool fetch_next = blocks == 1 && task + 1 < last && !args.source.token.data;
        if (begin >= end) continue;
        match_block<typename decltype(tag)::type>(args, row, begin, end, padded_depth, fetch_next, scratch,
                                                  best.data() + at, match.data() + at);
      }
    });
  });
  // About 10 ns per source: rows are grouped until a task is worth its start.
  parallel_for(args.batch_size, 1 + 4096 / (num_src + 16), [&](int64_t first, int64_t last) {
    SelectScratch scratch(num_src);
    for (int64_t batch = first; batch < last; ++batch) {
      number_rows(args, bipartite_row(args, batch), best.data() + batch * num_src, match.data() + batch * num_src,
                  scratch);
    }
  });
}

}  // namespace tokred
