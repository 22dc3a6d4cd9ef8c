// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per block of sources: it meets all destinations panel by panel and keeps the best of each row, so that the
// similarities never leave the registers. Unit vectors are made while packing; protected destinations are not
// packed at all. Then one task per batch row ranks the sources and numbers the output rows.
#include "merge/bipartite_match.h"

#include <algorithm>
#include <limits>

#include "common/dot_panel.h"
#include "common/dot_rows.h"
#include "common/topk.h"

namespace tokred {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int kLanes = kVecLanes;  // sums and maxima in one fixed order

// Rows 0, 1, ... or, by list, list[0], list[1], ..., widened and, if asked, scaled to unit length, eight at a time.
// padded_depth is a multiple of kVecLanes; its padding is zero. Padding rows are filler.
template <typename T>
TOKRED_CLONES void pack_units(const T* src, int64_t stride_row, const int32_t* list, int64_t rows, int64_t depth,
                              int64_t padded_rows, int64_t padded_depth, float filler, bool normalize, float eps,
                              float* dst) {
  const int64_t stride = dot_stride(padded_depth);
  for (int64_t i = 0; i < rows; i += 8) {
    Vec16 square[8];
    for (int64_t j = 0; j < 8; ++j) {
      square[j] = Vec16{};
      if (i + j >= rows) continue;
      const T* row = src + (list ? int64_t{list[i + j]} : i + j) * stride_row;
      float* out = dst + (i + j) * stride;
      Vec16 sum = {};
      for (int64_t c = 0; c < padded_depth; c += kVecLanes) {
        Vec16 value;
        if (c + kVecLanes <= depth) {
          load16(row + c, value);
        } else {
          load_part(row + c, std::max<int64_t>(depth - c, 0), value);
        }
        store16(out + c, value);
        sum += value * value;
      }
      square[j] = sum;
    }
    if (!normalize) continue;
    float scale[8];
    sum_lanes8(square, scale);
    for (int j = 0; j < 8; ++j) {
      const float norm = __builtin_sqrtf(scale[j]);
      scale[j] = 1.f / (norm < eps ? eps : norm);  // a NaN norm stays NaN
    }
    for (int64_t j = 0; j < 8 && i + j < rows; ++j) {
      float* out = dst + (i + j) * stride;
      for (int64_t c = 0; c < padded_depth; c += kVecLanes) {
        Vec16 value;
        load16(out + c, value);
        store16(out + c, value * scale[j]);
      }
    }
  }
  std::fill(dst + rows * stride, dst + padded_rows * stride, filler);
}

// Folds similarities, [rows, width], into each source's best lanes. Within a lane columns ascend and only a larger
// value replaces, so ties stay with the lowest; a lane is NaN until the first number, and NaN, in the data and in the
// panel's padding, is passed over.
TOKRED_CLONES void fold_panel(const float* value, int64_t rows, int64_t width, int32_t first_col, float* best,
                              int32_t* best_col) {
  for (int64_t i = 0; i < rows; ++i) {
    float* lane = best + i * kLanes;
    int32_t* at = best_col + i * kLanes;
    for (int32_t j = 0; j < width; j += kLanes) {
      const float* c = value + i * width + j;
      const int32_t column = first_col + j;
#pragma GCC unroll 1
      for (int l = 0; l < kLanes; ++l) {
        const int32_t larger = -(int32_t{c[l] == c[l]} & int32_t{!(c[l] <= lane[l])});  // bits: no branch
        at[l] = (at[l] & ~larger) | ((column + l) & larger);
        lane[l] = larger ? c[l] : lane[l];
      }
    }
  }
}

// The best of each source's lanes, the lowest column among equals; NaN and column -1 where every lane is NaN. The lanes
// of 16 sources are turned so that a comparison serves all of them.
TOKRED_CLONES void best_of_lanes(const float* best, const int32_t* best_col, int64_t rows, float* score, int32_t* col) {
  alignas(64) float lane[kLanes * kLanes], at_bits[kLanes * kLanes];
  for (int64_t i = 0; i < rows; i += kLanes) {
    transpose_panel(best + i * kLanes, kLanes, kLanes, kLanes, lane);
    transpose_panel(reinterpret_cast<const float*>(best_col + i * kLanes), kLanes, kLanes, kLanes, at_bits);
    int32_t at[kLanes * kLanes];
    std::memcpy(at, at_bits, sizeof(at));
    for (int l = 0; l < kLanes; ++l) {
      score[i + l] = kNaN;
      col[i + l] = -1;
    }
    for (int k = 0; k < kLanes; ++k) {
      const float* value = lane + k * kLanes;
#pragma GCC unroll 1
      for (int l = 0; l < kLanes; ++l) {
        const int32_t lower = int32_t{value[l] == score[i + l]} & int32_t{at[k * kLanes + l] < col[i + l]};
        const int32_t larger = int32_t{value[l] == value[l]} & int32_t{!(value[l] <= score[i + l])};
        const int32_t wins = -(lower | larger);  // bits: no branch
        col[i + l] = (col[i + l] & ~wins) | (at[k * kLanes + l] & wins);
        score[i + l] = wins ? value[l] : score[i + l];
      }
    }
  }
}

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
  MatchScratch(int64_t src_rows, int64_t padded_depth, int64_t max_dst)
      : src(src_rows * dot_stride(padded_depth)),
        dst(kMaxDotColumns * dot_stride(padded_depth)),
        panel(kMaxDotColumns * padded_depth),
        similarity(src_rows * kMaxDotColumns),
        best((src_rows + kLanes) * kLanes),
        score(src_rows + kLanes),
        best_col((src_rows + kLanes) * kLanes),
        col(src_rows + kLanes),
        list(max_dst + 1) {}
  AlignedBuffer<float> src, dst, panel, similarity, best, score;
  AlignedBuffer<int32_t> best_col, col, list;
};

// Sources [begin, end) of one batch row; fetch_next: the next one is about to follow.
template <typename T>
void match_block(const BipartiteMatchArgs& a, const BipartiteSets& sets, int64_t batch, int64_t begin, int64_t end,
                 int64_t padded_depth, bool fetch_next, MatchScratch& s) {
  const T* metric = static_cast<const T*>(a.metric) + batch * a.stride_batch;
  const uint8_t* protect = a.protect ? a.protect + batch * a.num_tokens : nullptr;
  const int64_t num_dst = protect ? list_destinations(protect, sets, s.list.data()) : sets.candidate_dst();
  const int64_t rows = end - begin, padded_rows = ceil_div(rows, int64_t{kDotRows}) * kDotRows;
  const int64_t lane_rows = ceil_div(rows, int64_t{kLanes}) * kLanes;
  const int64_t step = 2 * a.stride_token, stride = dot_stride(padded_depth);
  const T* first_dst = metric + (2 * sets.first_dst + 1) * a.stride_token;
  pack_units(metric + begin * step, step, nullptr, rows, a.dim, padded_rows, padded_depth, 0.f, a.normalize, a.eps,
             s.src.data());
  std::fill_n(s.best.data(), lane_rows * kLanes, kNaN);
  std::fill_n(s.best_col.data(), lane_rows * kLanes, 0);
  for (int64_t col = 0; col < num_dst;) {
    const int64_t width = num_dst - col > kVecLanes ? dot_columns() : kVecLanes;
    const int64_t cols = std::min(width, num_dst - col);
    pack_units(protect ? first_dst : first_dst + col * step, step, protect ? s.list.data() + col : nullptr, cols, a.dim,
               width, padded_depth, kNaN, a.normalize, a.eps, s.dst.data());
    transpose_panel(s.dst.data(), stride, width, padded_depth, s.panel.data());
    // Tile by tile, each after asking for its share of the tokens that the next batch row has at these places.
    const int64_t share = fetch_next ? ceil_div(2 * cols * kDotRows, padded_rows) : 0;
    for (int64_t i = 0, token = 2 * col; i < padded_rows; i += kDotRows, token += share) {
      for (int64_t t = token; t < std::min(token + share, 2 * (col + cols)); ++t)
        prefetch(metric + a.stride_batch + t * a.stride_token, a.dim * static_cast<int64_t>(sizeof(T)));
      dot_panel(s.src.data() + i * stride, stride, kDotRows, padded_depth, s.panel.data(), width,
                s.similarity.data() + i * width);
    }
    fold_panel(s.similarity.data(), rows, width, static_cast<int32_t>(col), s.best.data(), s.best_col.data());
    col += width;
  }
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
  const int64_t src_rows = bipartite_block_rows(sets.candidate_src());
  const int64_t padded_depth = std::max<int64_t>(ceil_div<int64_t>(args.dim, kLanes), 1) * kLanes;
  if (args.batch_size == 0 || args.num_tokens == 0) return;
  if (sets.candidate_src() > 0 && sets.candidate_dst() > 0) {
    const int64_t blocks = ceil_div(sets.candidate_src(), src_rows);
    parallel_for(args.batch_size * blocks, 1, [&](int64_t first, int64_t last) {
      MatchScratch scratch(src_rows, padded_depth, args.protect ? sets.num_dst : 0);
      dispatch_float(args.dtype, [&](auto tag) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t begin = sets.first_src + task % blocks * src_rows;
          match_block<typename decltype(tag)::type>(args, sets, task / blocks, begin,
                                                    std::min(begin + src_rows, sets.num_src), padded_depth,
                                                    blocks == 1 && task + 1 < last, scratch);
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
