// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Three passes over pairs, each by tasks of a block of rows (merge/cluster_panel.h), with the sequences' ranking
// between them: all pairs for the nearest neighbours; pairs of a token and a denser one, half of all since rows and
// columns come in the order of density, for the nearest denser token; tokens and centres for the clusters.
#include "merge/cluster_dpc_knn.h"

#include <algorithm>

#include "common/topk.h"
#include "merge/cluster_panel.h"

namespace tokred {
namespace {

constexpr int64_t kMaxRows = 192;  // of a task: no bit of the result depends on it
constexpr float kInf = __builtin_inff(), kNaN = __builtin_nanf("");

// What the passes hand on; indices count from a sequence's first token, as its outputs do.
struct State {
  State(const ClusterDpcArgs& a, int64_t num_blocks)
      : square(total(a)),
        distance(total(a)),
        farthest(a.batch_size * num_blocks + 1),
        listed(total(a)),
        order(total(a)),
        centre(total(a)),
        cluster(total(a)),
        num_listed(a.batch_size),
        num_ordered(a.batch_size) {}
  static int64_t total(const ClusterDpcArgs& a) { return (a.cu_seqlens ? 1 : a.batch_size) * a.num_tokens + 1; }
  AlignedBuffer<float> square, distance;  // of tokens: squared norm, squared distance to the nearest denser one
  AlignedBuffer<float> farthest;          // of tasks: largest squared distance
  AlignedBuffer<int32_t> listed, order;   // tokens that are not excluded; by falling density
  AlignedBuffer<int32_t> centre, cluster;
  AlignedBuffer<int32_t> num_listed, num_ordered;
};

struct Scratch {
  Scratch(const ClusterDpcArgs& a, int64_t max_rows)
      : pairs(max_rows, a.dim),
        row_square(max_rows),
        lanes(padded_lanes_of(max_rows) * kVecLanes * std::max<int64_t>(a.k, 1)),
        value(padded_lanes_of(max_rows)),
        best_col(padded_lanes_of(max_rows) * kVecLanes),
        col(padded_lanes_of(max_rows)) {}
  ClusterScratch pairs;
  AlignedBuffer<float> row_square, lanes, value;
  AlignedBuffer<int32_t> best_col, col;
};

// Folds products into the k smallest distances of each row and lane, nearest[row][rank][lane], ascending in rank, and
// into the largest of all, by lane. NaN fails every comparison and so is passed over.
TOKRED_CLONES void fold_nearest(const float* product, int64_t rows, int64_t width, const float* row_square,
                                const float* col_square, int64_t k, float* nearest, float* largest) {
  Vec16 high;
  load16(largest, high);
  for (int64_t i = 0; i < rows; ++i) {
    const float square = row_square[i];
    for (int64_t j = 0; j < width; j += kVecLanes) {
      Vec16 distance, of_col;
      load16(product + i * width + j, distance);
      load16(col_square + j, of_col);
      distance = (of_col + square) - distance * 2.f;
      const Vec16 zero = {};
      distance = distance < zero ? zero : distance;
      high = high < distance ? distance : high;
      float* list = nearest + i * k * kVecLanes;
      for (int64_t t = 0; t < k; ++t, list += kVecLanes) {
        Vec16 kept;
        load16(list, kept);
        store16(list, distance < kept ? distance : kept);
        distance = distance < kept ? kept : distance;
      }
    }
  }
  store16(largest, high);
}

// Folds products into the smallest distance of each row and lane; row i meets the first limit + i columns only.
TOKRED_CLONES void fold_smallest(const float* product, int64_t rows, int64_t width, const float* row_square,
                                 const float* col_square, int64_t limit, float* smallest) {
  for (int64_t i = 0; i < rows; ++i) {
    const float square = row_square[i];
    const float* value = product + i * width;
    float* lane = smallest + i * kVecLanes;
    const int64_t cols = std::min(width, limit + i), whole = cols > 0 ? cols / kVecLanes * kVecLanes : 0;
    Vec16 low;
    load16(lane, low);
    for (int64_t j = 0; j < whole; j += kVecLanes) {
      Vec16 distance, of_col;
      load16(value + j, distance);
      load16(col_square + j, of_col);
      distance = (of_col + square) - distance * 2.f;
      low = distance < low ? distance : low;
    }
    store16(lane, low);
    for (int64_t j = whole; j < cols; ++j) {
      const float distance = (col_square[j] + square) - value[j] * 2.f;
      if (distance < lane[j - whole]) lane[j - whole] = distance;
    }
  }
}

// The k smallest of a row's lanes, ascending, to out; returns how many are numbers.
int64_t merge_lanes(const float* lanes, int64_t k, float* out) {
  std::fill_n(out, k, kInf);
  for (int64_t l = 0; l < kVecLanes; ++l) {
    for (int64_t t = 0; t < k; ++t) {
      float value = lanes[t * kVecLanes + l];
      if (!(value < out[k - 1])) break;  // those after it are no smaller
      for (int64_t at = 0; at < k; ++at) {
        if (value < out[at]) std::swap(value, out[at]);
      }
    }
  }
  return std::count_if(out, out + k, [](float value) { return value < kInf; });
}

// One sequence.
template <typename T>
struct Sequence {
  const ClusterDpcArgs& a;
  State& s;
  int64_t batch, len, first;
  const T* x;

  Sequence(const ClusterDpcArgs& args, State& state, int64_t batch_idx) : a(args), s(state), batch(batch_idx) {
    const DpcSpan span = dpc_span(args, batch_idx);
    len = span.len;
    first = span.first;
    x = static_cast<const T*>(args.x) + batch_idx * args.stride_batch + span.begin * args.stride_token;
  }
  ClusterRows<T> rows(const int32_t* list) const { return {x, a.stride_token, list, a.dim, a.dtype}; }
  bool dropped(int64_t token) const { return a.drop_mask && a.drop_mask[first + token]; }
  // The squared norms of the listed tokens; NaN beyond count.
  void gather_squares(const int32_t* list, int64_t count, int64_t padded, float* out) const {
    for (int64_t i = 0; i < count; ++i) out[i] = s.square[first + list[i]];
    std::fill(out + count, out + padded, kNaN);
  }

  void list_tokens() {
    int32_t count = 0;
    for (int64_t i = 0; i < len; ++i) {
      s.listed[first + count] = static_cast<int32_t>(i);
      count += !dropped(i);
    }
    s.num_listed[batch] = count;
  }

  void find_squares(int64_t begin, int64_t end, Scratch& t) {
    float* out = s.square.data() + first;
    squares_of_rows(rows(nullptr).from(begin), end - begin, t.pairs, out + begin);
    for (int64_t i = begin; i < end; ++i) out[i] = dpc_square(out[i]);
  }

  // Folds the rows [begin, end) of a list with the first num_cols columns of another: fold(product, width, first
  // column, the columns' squared norms).
  template <typename Fold>
  void fold_pairs(const int32_t* row_list, int64_t begin, int64_t end, const int32_t* col_list, int64_t num_cols,
                  Scratch& t, const Fold& fold) {
    gather_squares(row_list + begin, end - begin, end - begin, t.row_square.data());
    for_each_panel(rows(row_list + begin), end - begin, rows(col_list), num_cols, t.pairs,
                   [&](float* product, int64_t width, int64_t col) {
                     float col_square[kMaxDotColumns];
                     gather_squares(col_list + col, std::min(width, num_cols - col), width, col_square);
                     fold(product, width, col, col_square);
                   });
  }

  // Returns the largest squared distance of the rows.
  float find_density(int64_t begin, int64_t end, Scratch& t) {
    const int32_t* list = s.listed.data() + first;
    float largest[kVecLanes] = {};
    std::fill_n(t.lanes.data(), (end - begin) * a.k * kVecLanes, kInf);
    fold_pairs(list, begin, end, list, s.num_listed[batch], t,
               [&](const float* product, int64_t width, int64_t, const float* col_square) {
                 fold_nearest(product, end - begin, width, t.row_square.data(), col_square, a.k, t.lanes.data(),
                              largest);
               });
    for (int64_t i = begin; i < end; ++i) {
      float nearest[kDpcMaxNeighbours], sum = 0.f;
      const int64_t count = merge_lanes(t.lanes.data() + (i - begin) * a.k * kVecLanes, a.k, nearest);
      for (int64_t k = 0; k < count; ++k) sum += nearest[k];
      a.log_density[first + list[i]] =
          dpc_log_density(a, sum, static_cast<int>(count), s.square[first + list[i]], list[i]);
    }
    return *std::max_element(largest, largest + kVecLanes);
  }

  // Tokens that have a density, the densest first, ties by index.
  void rank_tokens() {
    const float* density = a.log_density + first;
    int32_t *order = s.order.data() + first, count = 0;
    for (int64_t i = 0; i < s.num_listed[batch]; ++i) {
      order[count] = s.listed[first + i];
      count += density[order[count]] == density[order[count]];
    }
    std::sort(order, order + count,
              [&](int32_t i, int32_t j) { return density[i] != density[j] ? density[i] > density[j] : i < j; });
    s.num_ordered[batch] = count;
  }

  // Of the tokens [begin, end) in the order of density.
  void find_denser(int64_t begin, int64_t end, Scratch& t) {
    const int32_t* order = s.order.data() + first;
    std::fill_n(t.lanes.data(), (end - begin) * kVecLanes, kInf);
    fold_pairs(order, begin, end, order, end, t,
               [&](const float* product, int64_t width, int64_t col, const float* col_square) {
                 fold_smallest(product, end - begin, width, t.row_square.data(), col_square, begin - col,
                               t.lanes.data());
               });
    for (int64_t i = begin; i < end; ++i) {
      const float* lane = t.lanes.data() + (i - begin) * kVecLanes;
      const float smallest = *std::min_element(lane, lane + kVecLanes);
      s.distance[first + order[i]] = smallest < 0.f ? 0.f : smallest;
    }
  }

  // Scores, centres and the order of clusters.
  void choose_centres(float farthest, TopkScratch& topk) {
    int64_t* out = a.centre_idx + batch * a.num_clusters;
    std::fill_n(out, a.num_clusters, int64_t{-1});
    for (int64_t i = 0; i < s.num_listed[batch]; ++i) a.score[first + s.listed[first + i]] = kNaN;
    for (int64_t i = 0; i < s.num_ordered[batch]; ++i) {
      const int64_t token = first + s.order[first + i];
      a.score[token] = dpc_score(a, a.log_density[token], i == 0 ? farthest : s.distance[token]);
    }
    const TopkRow<float> row{a.score + first, 1, nullptr, a.drop_mask ? a.drop_mask + first : nullptr,
                             static_cast<int32_t>(len)};
    AlignedBuffer<int32_t> ranked(std::min(a.num_clusters, len) + 32);
    const int64_t count = topk_ascending(row, a.num_clusters, ranked.data(), topk);
    a.num_centres[batch] = static_cast<int32_t>(count);
    std::copy_n(ranked.data(), count, s.centre.data() + first);
    if (a.by_score) sort_by_score(row, ranked.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      out[i] = ranked[i];
      a.dst_idx[first + ranked[i]] = i;
    }
    for (int64_t i = 0; i < count; ++i) {
      s.cluster[first + i] = static_cast<int32_t>(a.dst_idx[first + s.centre[first + i]]);
    }
  }

  void assign(int64_t begin, int64_t end, Scratch& t) {
    const int32_t* list = s.listed.data() + first;
    const int64_t num_centres = a.num_centres[batch], rows = end - begin;
    if (num_centres == 0) return;
    start_best(rows, t.lanes.data(), t.best_col.data());
    fold_pairs(list, begin, end, s.centre.data() + first, num_centres, t,
               [&](float* product, int64_t width, int64_t col, const float* col_square) {
                 panel_distances(rows, width, t.row_square.data(), col_square, product);
                 fold_best(product, rows, width, static_cast<int32_t>(col), t.lanes.data(), t.best_col.data());
               });
    best_of_lanes(t.lanes.data(), t.best_col.data(), rows, t.value.data(), t.col.data());
    for (int64_t i = 0; i < rows; ++i) {
      int64_t& dst = a.dst_idx[first + list[begin + i]];
      if (dst < 0) dst = s.cluster[first + std::max(t.col[i], 0)];  // centres have their own
    }
  }
};

// body(sequence, begin, end, task, scratch) for blocks of each sequence's count(sequence) rows. The first and the last
// block make a pair, so that tasks of rows that cost more and more are alike.
template <typename T, typename Count, typename Body>
void for_blocks(const ClusterDpcArgs& a, State& s, int64_t num_blocks, const Count& count, const Body& body) {
  const int64_t pairs = ceil_div(num_blocks, int64_t{2});
  parallel_for(a.batch_size * pairs, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(a, cluster_block_rows(kMaxRows, kMaxRows));
    for (int64_t task = 2 * first; task < 2 * last; ++task) {
      const int64_t batch = task / 2 / pairs, pair = task / 2 % pairs;
      Sequence<T> sequence(a, s, batch);
      const int64_t rows = count(sequence), step = cluster_block_rows(rows, kMaxRows), blocks = ceil_div(rows, step);
      const int64_t block = task % 2 ? blocks - 1 - pair : pair;
      if (pair >= ceil_div(blocks, int64_t{2}) || (task % 2 && block == pair)) continue;
      body(sequence, block * step, std::min(block * step + step, rows), batch * num_blocks + block, scratch);
    }
  });
}

template <typename T>
void run(const ClusterDpcArgs& a) {
  const int64_t num_blocks = std::max<int64_t>(ceil_div(a.max_seqlen, kMaxRows), 1);  // of a sequence, at most
  State s(a, num_blocks);
  const auto for_sequences = [&](const auto& body) {
    parallel_for(a.batch_size, 1, [&](int64_t begin, int64_t end) {
      for (int64_t batch = begin; batch < end; ++batch) body(Sequence<T>(a, s, batch));
    });
  };
  using Self = Sequence<T>;
  const int64_t tokens = (a.cu_seqlens ? 1 : a.batch_size) * a.num_tokens;
  std::fill_n(a.dst_idx, tokens, int64_t{-1});  // of tokens that are excluded or belong to no sequence
  std::fill_n(a.score, tokens, -kInf);
  std::fill_n(a.log_density, tokens, -kInf);
  std::fill_n(s.farthest.data(), a.batch_size * num_blocks, 0.f);
  for_sequences([](Self q) { q.list_tokens(); });
  for_blocks<T>(
      a, s, num_blocks, [](const Self& q) { return q.len; },
      [](Self& q, int64_t begin, int64_t end, int64_t, Scratch& t) { q.find_squares(begin, end, t); });
  const auto listed = [](const Self& q) { return int64_t{q.s.num_listed[q.batch]}; };
  for_blocks<T>(a, s, num_blocks, listed, [](Self& q, int64_t begin, int64_t end, int64_t task, Scratch& t) {
    q.s.farthest[task] = q.find_density(begin, end, t);
  });
  for_sequences([](Self q) { q.rank_tokens(); });
  for_blocks<T>(
      a, s, num_blocks, [](const Self& q) { return int64_t{q.s.num_ordered[q.batch]}; },
      [](Self& q, int64_t begin, int64_t end, int64_t, Scratch& t) { q.find_denser(begin, end, t); });
  for_sequences([&](Self q) {
    TopkScratch topk(q.len);
    const float* farthest = s.farthest.data() + q.batch * num_blocks;
    q.choose_centres(*std::max_element(farthest, farthest + num_blocks), topk);
  });
  for_blocks<T>(a, s, num_blocks, listed,
                [](Self& q, int64_t begin, int64_t end, int64_t, Scratch& t) { q.assign(begin, end, t); });
}

}  // namespace

void cluster_dpc_knn_cpu(const ClusterDpcArgs& args) {
  if (args.batch_size == 0) return;
  dispatch_float(args.dtype, [&](auto tag) { run<typename decltype(tag)::type>(args); });
}

}  // namespace tokred
