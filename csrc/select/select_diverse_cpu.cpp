// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Nearly all time goes into similarities. The farthest start needs those of all pairs: tiles on and above the diagonal
// are multiplied, the others are their transposes. Else only rows of picked tokens are needed, and single rows would be
// bound by memory: when one is missing it is made together with those of the 31 tokens that are most valued at that
// moment, which are the likeliest to be picked next. Which rows are made follows from the picks so far and never from
// k, so neither do their bits. The greedy loop itself is three passes over a few thousand floats per pick.
#include "select/select_diverse.h"

#include <algorithm>
#include <cstring>

#include "common/gemm.h"
#include "common/topk.h"
#include "common/vector_math.h"

namespace tokred {
namespace {

constexpr int64_t kDepthStep = 16;  // rows are padded to this many floats

template <typename T>
TOKRED_CLONES float sum_of_squares(const T* row, int64_t dim) {
  float lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<float>(row[c + l]) * static_cast<float>(row[c + l]);
  }
  for (int l = 0; c < dim; ++c, ++l) lanes[l] += static_cast<float>(row[c]) * static_cast<float>(row[c]);
  return sum_lanes(lanes);
}

// The largest of row[0, n) where skip is 0, which is NaN elsewhere; NaN is passed over. -inf: there is none.
TOKRED_CLONES float largest_of(const float* row, const float* skip, int64_t n) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -kDiverseInf;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float v = row[i + l] + skip[i + l];
      lanes[l] = v > lanes[l] ? v : lanes[l];
    }
  }
  for (int l = 0; i < n; ++i, ++l) {
    const float v = row[i] + skip[i];
    lanes[l] = v > lanes[l] ? v : lanes[l];
  }
  return max_lanes(lanes);
}

TOKRED_CLONES void fold_row(DiverseRule rule, const float* row, int64_t n, float* state) {
  if (rule == DiverseRule::kMaxSum) {
    for (int64_t i = 0; i < n; ++i) state[i] = diverse_fold(DiverseRule::kMaxSum, state[i], row[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) state[i] = diverse_fold(DiverseRule::kMaxMin, state[i], row[i]);
  }
}

struct ValueRule {
  DiverseRule rule;
  float base, lam;
};
TOKRED_CLONES void fill_values(const ValueRule& r, const float* state, const float* weight, int64_t n, float* value) {
  const float base = r.base, lam = r.lam;
  if (r.rule == DiverseRule::kMaxSum) {
    for (int64_t i = 0; i < n; ++i) value[i] = diverse_value(DiverseRule::kMaxSum, base, lam, state[i], false, 0.f);
  } else if (r.rule == DiverseRule::kMmr) {
    for (int64_t i = 0; i < n; ++i) value[i] = diverse_value(DiverseRule::kMmr, base, lam, state[i], true, weight[i]);
  } else if (weight) {
    for (int64_t i = 0; i < n; ++i)
      value[i] = diverse_value(DiverseRule::kMaxMin, base, lam, state[i], true, weight[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) value[i] = diverse_value(DiverseRule::kMaxMin, base, lam, state[i], false, 0.f);
  }
}

// Distances to one position; x, y, z: n coordinates each.
TOKRED_CLONES void distances_to(const float* x, const float* y, const float* z, int64_t n, int64_t pick, float* out) {
  const float px = x[pick], py = y[pick], pz = z[pick];
  for (int64_t i = 0; i < n; ++i) out[i] = __builtin_sqrtf(diverse_geometry(x[i] - px, y[i] - py, z[i] - pz));
}
TOKRED_CLONES void blend_positions(const float* similarity, const float* distance, float feature, float per_distance,
                                   int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = diverse_with_position(similarity[i], feature, distance[i], per_distance);
}

TOKRED_CLONES void l2_similarities(const float* product, float term, const float* terms, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = diverse_similarity(DiverseMetric::kL2, product[i], term, terms[i]);
}

// One sequence.
template <typename T>
struct Sequence {
  const T* x;
  int64_t stride, n, dim;
  DiverseMetric metric;
  const float* term;

  int64_t tile() const { return diverse_tile(n); }
  int64_t padded_dim() const { return std::max<int64_t>(ceil_div(dim, kDepthStep), 1) * kDepthStep; }
  // Tokens first, first + 1, ... or, by list, list[0], list[1], ...: what the product multiplies, zeros up to padded.
  void pack(int64_t first, const int32_t* list, int64_t count, int64_t padded, float* out) const {
    for (int64_t r = 0; r < padded; ++r) {
      const int64_t token = r >= count ? 0 : list ? int64_t{list[r]} : first + r;
      const float scale = metric == DiverseMetric::kCosine ? term[token] : 1.f;
      pack_rows(x + token * stride, stride, r < count, dim, 1, padded_dim(), scale, out + r * padded_dim());
    }
  }
  // Similarities of a token to count others out of their products.
  void similarities(const float* product, int64_t token, int64_t first, int64_t count, float* out) const {
    if (metric == DiverseMetric::kCosine) {
      std::memcpy(out, product, static_cast<size_t>(count) * sizeof(float));
    } else {
      l2_similarities(product, term[token], term + first, count, out);
    }
  }
};

// Similarities of all pairs to gram [n, n]: one task per block of rows, from the diagonal on.
template <typename T>
void whole_gram(const Sequence<T>& s, float* gram) {
  const int64_t tile = s.tile(), blocks = ceil_div(s.n, tile);
  // Block rows get shorter: a task takes one from the start and one from the end.
  parallel_for_gemm(ceil_div(blocks, int64_t{2}), [&](int64_t begin, int64_t end) {
    AlignedBuffer<float> a(tile * s.padded_dim()), b(tile * s.padded_dim());
    AlignedBuffer<float> product(tile * tile);
    for (int64_t task = 2 * begin; task < 2 * end; ++task) {
      const int64_t block = task % 2 ? blocks - 1 - task / 2 : task / 2;
      if (task % 2 && block == task / 2) continue;  // the middle one
      const int64_t row = block * tile, rows = std::min(tile, s.n - row);
      s.pack(row, nullptr, rows, tile, a.data());
      for (int64_t col = row; col < s.n; col += tile) {
        const int64_t cols = std::min(tile, s.n - col);
        if (col > row) s.pack(col, nullptr, cols, tile, b.data());
        gemm_nt(a.data(), col > row ? b.data() : a.data(), product.data(), tile, tile, s.padded_dim());
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t from = col > row ? 0 : i;  // one of each pair decides
          s.similarities(&product[i * tile + from], row + i, col + from, cols - from,
                         gram + (row + i) * s.n + col + from);
        }
        constexpr int64_t kSquare = 16;  // one cache line of each row
        for (int64_t i0 = 0; i0 < rows; i0 += kSquare) {
          for (int64_t j = 0; j < cols; ++j) {
            const int64_t i1 = std::min(rows, i0 + kSquare);
            float* to = gram + (col + j) * s.n + row;
            for (int64_t i = i0; i < i1 && (col > row || i < j); ++i) to[i] = gram[(row + i) * s.n + col + j];
          }
        }
      }
    }
  });
}

// Similarities of the listed tokens to all, row r to out[slot[r]].
template <typename T>
void strip_of_rows(const Sequence<T>& s, const int32_t* list, int64_t count, float* const* out) {
  const int64_t tile = s.tile(), blocks = ceil_div(s.n, tile);
  parallel_for_gemm(blocks, [&](int64_t begin, int64_t end) {
    AlignedBuffer<float> a(kDiverseStripRows * s.padded_dim()), b(tile * s.padded_dim());
    AlignedBuffer<float> product(kDiverseStripRows * tile);
    s.pack(0, list, count, kDiverseStripRows, a.data());
    for (int64_t block = begin; block < end; ++block) {
      const int64_t col = block * tile, cols = std::min(tile, s.n - col);
      s.pack(col, nullptr, cols, tile, b.data());
      gemm_nt(a.data(), b.data(), product.data(), kDiverseStripRows, tile, s.padded_dim());
      for (int64_t r = 0; r < count; ++r) s.similarities(&product[r * tile], list[r], col, cols, out[r] + col);
    }
  });
}

// Of each token the largest similarity to another that is not skipped.
void nearest_in_gram(const float* gram, const float* skip, int64_t n, float* nearest) {
  parallel_for(n, 1 + 65536 / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float before = largest_of(gram + i * n, skip, i);
      const float after = largest_of(gram + i * n + i + 1, skip + i + 1, n - i - 1);
      nearest[i] = before > after ? before : after;
    }
  });
}

// The same for sequences whose similarities are not kept: a strip of rows at a time.
template <typename T>
void nearest_by_strips(const Sequence<T>& s, const float* skip, float* nearest) {
  const int64_t tile = s.tile();
  parallel_for_gemm(ceil_div(s.n, tile), [&](int64_t begin, int64_t end) {
    AlignedBuffer<float> a(tile * s.padded_dim()), b(tile * s.padded_dim());
    AlignedBuffer<float> product(tile * tile), row(tile);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * tile, rows = std::min(tile, s.n - first);
      s.pack(first, nullptr, rows, tile, a.data());
      std::fill_n(nearest + first, rows, -kDiverseInf);
      for (int64_t col = 0; col < s.n; col += tile) {
        const int64_t cols = std::min(tile, s.n - col);
        s.pack(col, nullptr, cols, tile, b.data());
        gemm_nt(a.data(), b.data(), product.data(), tile, tile, s.padded_dim());
        for (int64_t i = 0; i < rows; ++i) {
          s.similarities(&product[i * tile], first + i, col, cols, row.data());
          if (col == first) row[i] = kDiverseNaN;  // itself
          nearest[first + i] = std::max(nearest[first + i], largest_of(row.data(), skip + col, cols));
        }
      }
    }
  });
}

// Rows of similarities, made when they are first asked for. Room for all of them up to kDiverseGramTokens; beyond, they
// are thrown away when the room is full.
template <typename T>
class Rows {
 public:
  Rows(const Sequence<T>& s, bool all)
      : s_(s),
        capacity_(std::max(std::min(s.n, kDiverseGramBytes / 4 / s.n), kDiverseStripRows)),
        data_(capacity_ * s.n),
        slot_(s.n),
        drop_(s.n),
        list_(kDiverseStripRows + 32),
        topk_(s.n) {
    for (int64_t i = 0; i < s.n; ++i) slot_[i] = all ? static_cast<int32_t>(i) : -1;
    if (all) whole_gram(s_, data_.data());
  }
  const float* whole() const { return data_.data(); }

  // value: what tokens are worth now; taken: those that will not be picked any more.
  const float* row(int64_t pick, const float* value, const uint8_t* taken) {
    if (slot_[pick] < 0) make(pick, value, taken);
    return data_.data() + slot_[pick] * s_.n;
  }

 private:
  void make(int64_t pick, const float* value, const uint8_t* taken) {
    if (used_ + kDiverseStripRows > capacity_ && capacity_ < s_.n) {
      std::fill_n(slot_.data(), s_.n, -1);
      used_ = 0;
    }
    list_[0] = static_cast<int32_t>(pick);
    for (int64_t i = 0; i < s_.n; ++i) drop_[i] = taken[i] || slot_[i] >= 0 || i == pick;
    const TopkRow<float> values{value, 1, nullptr, drop_.data(), static_cast<int32_t>(s_.n)};
    const int64_t count = 1 + topk_ascending(values, kDiverseStripRows - 1, list_.data() + 1, topk_);
    float* out[kDiverseStripRows];
    for (int64_t r = 0; r < count; ++r) {
      slot_[list_[r]] = static_cast<int32_t>(used_);
      out[r] = data_.data() + used_++ * s_.n;
    }
    strip_of_rows(s_, list_.data(), count, out);
  }

  const Sequence<T>& s_;
  int64_t capacity_, used_ = 0;
  AlignedBuffer<float> data_;
  AlignedBuffer<int32_t> slot_;
  AlignedBuffer<uint8_t> drop_;
  AlignedBuffer<int32_t> list_;
  TopkScratch topk_;
};

// The lowest index of the largest value; NaN ranks below every number, tokens that are taken do not take part. n: none.
int64_t best_token(const float* value, const float* no_skip, const uint8_t* taken, int64_t n) {
  const float best = largest_of(value, no_skip, n);  // taken tokens have the value NaN
  int64_t i = 0;
  while (i < n && !(value[i] == best)) ++i;
  if (i < n) return i;
  for (i = 0; i < n && taken[i]; ++i) {
  }
  return i;
}

// What the greedy loop keeps of each token.
struct Tokens {
  explicit Tokens(int64_t n)
      : term(n + 1),
        state(n + 1),
        folded(n + 1),
        value(n + 1),
        skip(n + 1),
        zeros(n + 1),
        nearest(n + 1),
        weight(n + 1),
        coordinate(3 * n + 1),
        distance(n + 1),
        blended(n + 1),
        taken(n + 1) {}
  AlignedBuffer<float> term, state, folded, value, skip, zeros, nearest, weight, coordinate, distance, blended;
  AlignedBuffer<uint8_t> taken;
};

// Reads everything about the tokens but similarities; returns how many may be picked.
template <typename T>
int64_t read_tokens(const SelectDiverseArgs& a, const Sequence<T>& s, int64_t first, const ScorePtr& weight,
                    int64_t first_weight, Tokens& t) {
  parallel_for(s.n, 1 + 65536 / (s.dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float squares = sum_of_squares(s.x + i * s.stride, s.dim);
      t.term[i] = diverse_term(a.metric, squares, __builtin_sqrtf(squares));
    }
  });
  int64_t eligible = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    const bool drop = a.drop_mask && a.drop_mask[first + i];
    for (int c = 0; a.positions && c < 3; ++c) {
      const float coordinate = a.positions[3 * (first + i) + c];
      t.coordinate[c * s.n + i] = coordinate;
      t.term[i] += diverse_zero_if_finite(coordinate);
    }
    const bool number = t.term[i] == t.term[i];
    if (weight.data) t.weight[i] = weight[first_weight + i];
    t.taken[i] = drop;
    t.zeros[i] = 0.f;
    t.skip[i] = drop || !number ? kDiverseNaN : 0.f;
    t.state[i] = t.folded[i] = drop || !number ? kDiverseNaN : diverse_initial(a.rule);
    eligible += !drop;
  }
  return eligible;
}

template <typename T>
void select_sequence(const SelectDiverseArgs& a, int64_t batch) {
  const TokenSpan span = diverse_span(a, batch);
  const int64_t n = span.len, first = diverse_first_token(a, batch, span);
  int64_t* kept = a.kept_idx + batch * a.k;
  float* out_value = a.value + batch * a.k;
  std::fill_n(kept, a.k, int64_t{-1});
  std::fill_n(out_value, a.k, -kDiverseInf);
  a.num_kept[batch] = 0;
  if (n == 0 || a.k == 0) return;

  Tokens t(n);
  const Sequence<T> s{static_cast<const T*>(a.x) + batch * a.stride_batch + span.begin * a.stride_token,
                      a.stride_token,
                      n,
                      a.dim,
                      a.metric,
                      t.term.data()};
  const int64_t eligible = read_tokens(a, s, first, a.weight, batch * a.stride_weight + span.begin, t);
  const int64_t count = std::min(a.k, eligible);
  const DiverseScale scale = diverse_scale(a);
  Rows<T> rows(s, a.start == DiverseStart::kFarthest && n <= kDiverseGramTokens);

  // Values of the first step.
  int64_t given = -1;
  if (a.start == DiverseStart::kFarthest) {
    if (n <= kDiverseGramTokens) {
      nearest_in_gram(rows.whole(), t.skip.data(), n, t.nearest.data());
    } else {
      nearest_by_strips(s, t.skip.data(), t.nearest.data());
    }
    const float base = a.metric == DiverseMetric::kCosine ? 1.f : 0.f;
    for (int64_t i = 0; i < n; ++i) t.value[i] = t.state[i] == t.state[i] ? base - t.nearest[i] : kDiverseNaN;
  } else {
    const bool by_weight = a.start == DiverseStart::kWeight;
    for (int64_t i = 0; i < n; ++i)
      t.value[i] = t.state[i] == t.state[i] ? (by_weight ? t.weight[i] : kDiverseInf) : kDiverseNaN;
    if (a.start == DiverseStart::kGiven) given = a.start_idx[batch];
    if (given < 0 || given >= n || t.taken[given]) given = -1;
  }

  const ValueRule rule{a.rule, scale.base, a.lam};
  const float* weight = a.weight.data ? t.weight.data() : nullptr;
  int64_t left = a.start == DiverseStart::kWeight ? a.picks_per_step : 1;  // picks of this step
  float per_distance = 0.f;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pick = given >= 0 ? given : best_token(t.value.data(), t.zeros.data(), t.taken.data(), n);
    given = -1;
    kept[i] = pick;
    out_value[i] = t.value[pick];
    if (i + 1 == count) break;
    t.taken[pick] = 1;
    const float* row = rows.row(pick, t.value.data(), t.taken.data());
    if (a.positions) {
      const float* xyz = t.coordinate.data();
      distances_to(xyz, xyz + n, xyz + 2 * n, n, pick, t.distance.data());
      if (i == 0) {
        per_distance = diverse_per_distance(a.position_weight, largest_of(t.distance.data(), t.skip.data(), n));
      }
      blend_positions(row, t.distance.data(), scale.feature, per_distance, n, t.blended.data());
      row = t.blended.data();
    }
    fold_row(a.rule, row, n, t.folded.data());
    t.folded[pick] = t.state[pick] = t.value[pick] = kDiverseNaN;
    if (--left > 0) continue;
    left = a.picks_per_step;
    std::memcpy(t.state.data(), t.folded.data(), static_cast<size_t>(n) * sizeof(float));
    fill_values(rule, t.state.data(), weight, n, t.value.data());
  }
  a.num_kept[batch] = static_cast<int32_t>(count);
  if (!a.by_index) return;
  // Values travel with their tokens.
  for (int64_t i = 0; i < count; ++i) t.value[kept[i]] = out_value[i];
  std::sort(kept, kept + count);
  for (int64_t i = 0; i < count; ++i) out_value[i] = t.value[kept[i]];
}

}  // namespace

void select_diverse_cpu(const SelectDiverseArgs& args) {
  const auto sequences = [&](int64_t begin, int64_t end) {
    dispatch_float(args.dtype, [&](auto tag) {
      for (int64_t batch = begin; batch < end; ++batch) select_sequence<typename decltype(tag)::type>(args, batch);
    });
  };
  // A single sequence runs its products in parallel, several run side by side: a parallel region inside another is one
  // task.
  if (args.batch_size == 1) return sequences(0, 1);
  parallel_for(args.batch_size, 1, sequences);
}

}  // namespace tokred
