// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per block of sources: it meets all destinations tile by tile and keeps the best of each row, so that the
// similarities never leave a thread's scratch. Unit vectors are made while packing; protected destinations are not
// packed at all. Then one task per batch row ranks the sources and numbers the output rows.
#include "merge/bipartite_match.h"

#include <algorithm>
#include <limits>

#include "common/gemm.h"
#include "common/topk.h"

namespace tokred {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int kLanes = 16;  // a register of the widest clone: sums and maxima in one fixed order

// The loops over lanes are not unrolled: the compiler would then miss that a lane loop is one vector operation.
template <int kWidth>
TOKRED_INLINE void add_halves(float* lane) {
#pragma GCC unroll 1
  for (int l = 0; l < kWidth; ++l) lane[l] += lane[l + kWidth];
  if constexpr (kWidth > 1) add_halves<kWidth / 2>(lane);
}
template <int kWidth>
TOKRED_INLINE void max_halves(float* lane) {
#pragma GCC unroll 1
  for (int l = 0; l < kWidth; ++l) lane[l] = lane[l + kWidth] > lane[l] ? lane[l + kWidth] : lane[l];
  if constexpr (kWidth > 1) max_halves<kWidth / 2>(lane);
}

TOKRED_INLINE float norm_of(const float* row, int64_t depth) {
  float lane[kLanes] = {};
  for (int64_t c = 0; c < depth; c += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += row[c + l] * row[c + l];
  }
  add_halves<kLanes / 2>(lane);
  return __builtin_sqrtf(lane[0]);
}

// Rows 0, 1, ... or, by list, list[0], list[1], ..., widened and, if asked, scaled to unit length. padded_depth is a
// multiple of kLanes; its padding is zero. Padding rows are filler.
template <typename T>
TOKRED_CLONES void pack_units(const T* src, int64_t stride_row, const int32_t* list, int64_t rows, int64_t depth,
                              int64_t padded_rows, int64_t padded_depth, float filler, bool normalize, float eps,
                              float* dst) {
  for (int64_t i = 0; i < rows; ++i) {
    float* out = dst + i * padded_depth;
    const T* row = src + (list ? int64_t{list[i]} : i) * stride_row;
    for (int64_t c = 0; c < depth; ++c) out[c] = static_cast<float>(row[c]);
    for (int64_t c = depth; c < padded_depth; ++c) out[c] = 0.f;
    if (normalize) {
      const float norm = norm_of(out, padded_depth);
      const float scale = 1.f / (norm < eps ? eps : norm);  // a NaN norm stays NaN
      for (int64_t c = 0; c < padded_depth; ++c) out[c] *= scale;
    }
  }
  for (int64_t i = rows * padded_depth; i < padded_rows * padded_depth; ++i) dst[i] = filler;
}

// Folds a tile into each row's best. Within a lane and over tiles columns ascend and only a larger value replaces, and
// among lanes the lowest column wins: ties stay with the lowest. A comparison with NaN is false, so NaN is passed over,
// in the data and in the tile's padding. best_col -1: nothing but NaN so far.
TOKRED_CLONES void fold_best(const float* tile, int64_t rows, int64_t stride_row, int64_t cols, int64_t first_col,
                             float* best, int32_t* best_col) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* c = tile + i * stride_row;
    float lane[kLanes];
    int32_t at[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      lane[l] = -kInf;
      at[l] = INT32_MAX;
    }
    for (int32_t j = 0; j < cols; j += kLanes) {  // the tile's rows are padded to kLanes
#pragma GCC unroll 1
      for (int l = 0; l < kLanes; ++l) {
        const int32_t larger = -int32_t{c[j + l] > lane[l]};  // bits, not a branch: rows improve unpredictably
        at[l] = (at[l] & ~larger) | ((j + l) & larger);
        lane[l] = c[j + l] > lane[l] ? c[j + l] : lane[l];
      }
    }
    float top[kLanes];
    for (int l = 0; l < kLanes; ++l) top[l] = lane[l];
    max_halves<kLanes / 2>(top);
    if (top[0] > best[i]) {
      int32_t found = INT32_MAX;
#pragma GCC unroll 1
      for (int l = 0; l < kLanes; ++l) {
        const int32_t here = at[l] | (-int32_t{lane[l] < top[0]} & INT32_MAX);
        found = here < found ? here : found;
      }
      best[i] = top[0];
      best_col[i] = static_cast<int32_t>(first_col) + found;
    } else if (best_col[i] < 0) {  // -inf is a number, too
      for (int64_t j = 0; j < cols && best_col[i] < 0; ++j) {
        if (c[j] == -kInf) best_col[i] = static_cast<int32_t>(first_col + j);
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
  MatchScratch(const BipartiteMatchTile& tile, int64_t padded_depth, int64_t max_dst)
      : src(tile.src_rows * padded_depth),
        dst(tile.dst_rows * padded_depth),
        similarity(tile.src_rows * tile.dst_rows),
        best(tile.src_rows),
        best_col(tile.src_rows),
        list(max_dst + 1) {}
  AlignedBuffer<float> src, dst, similarity, best;
  AlignedBuffer<int32_t> best_col, list;
};

// Sources [begin, end) of one batch row.
template <typename T>
void match_block(const BipartiteMatchArgs& a, const BipartiteSets& sets, const BipartiteMatchTile& tile, int64_t batch,
                 int64_t begin, int64_t end, int64_t padded_depth, MatchScratch& s) {
  const T* metric = static_cast<const T*>(a.metric) + batch * a.stride_batch;
  const uint8_t* protect = a.protect ? a.protect + batch * a.num_tokens : nullptr;
  const int64_t num_dst = protect ? list_destinations(protect, sets, s.list.data()) : sets.candidate_dst();
  const int64_t rows = end - begin, step = 2 * a.stride_token;
  const T* first_dst = metric + (2 * sets.first_dst + 1) * a.stride_token;
  pack_units(metric + begin * step, step, nullptr, rows, a.dim, tile.src_rows, padded_depth, 0.f, a.normalize, a.eps,
             s.src.data());
  std::fill_n(s.best.data(), rows, -kInf);
  std::fill_n(s.best_col.data(), rows, -1);
  for (int64_t col = 0; col < num_dst; col += tile.dst_rows) {
    const int64_t cols = std::min(tile.dst_rows, num_dst - col);
    pack_units(protect ? first_dst : first_dst + col * step, step, protect ? s.list.data() + col : nullptr, cols, a.dim,
               tile.dst_rows, padded_depth, kNaN, a.normalize, a.eps, s.dst.data());
    gemm_nt(s.src.data(), s.dst.data(), s.similarity.data(), tile.src_rows, tile.dst_rows, padded_depth);
    fold_best(s.similarity.data(), rows, tile.dst_rows, cols, col, s.best.data(), s.best_col.data());
  }
  for (int64_t i = 0; i < rows; ++i) {
    const bool all_nan = s.best_col[i] < 0;
    const int64_t col = all_nan ? 0 : s.best_col[i];
    const int64_t token = 2 * (begin + i), out = batch * a.num_tokens + token;
    a.match_idx[out] = 2 * (sets.first_dst + (protect ? int64_t{s.list[col]} : col)) + 1;
    a.score[out] = protect && protect[token] ? -kInf : all_nan ? kNaN : s.best[i];
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
  const BipartiteMatchTile tile = bipartite_match_tile(sets);
  const int64_t padded_depth = std::max<int64_t>(ceil_div<int64_t>(args.dim, kLanes), 1) * kLanes;
  if (args.batch_size == 0 || args.num_tokens == 0) return;
  if (sets.candidate_src() > 0 && sets.candidate_dst() > 0) {
    const int64_t blocks = ceil_div(sets.candidate_src(), tile.src_rows);
    parallel_for_gemm(args.batch_size * blocks, [&](int64_t first, int64_t last) {
      MatchScratch scratch(tile, padded_depth, args.protect ? sets.num_dst : 0);
      dispatch_float(args.dtype, [&](auto tag) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t begin = sets.first_src + task % blocks * tile.src_rows;
          match_block<typename decltype(tag)::type>(args, sets, tile, task / blocks, begin,
                                                    std::min(begin + tile.src_rows, sets.num_src), padded_depth,
                                                    scratch);
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
