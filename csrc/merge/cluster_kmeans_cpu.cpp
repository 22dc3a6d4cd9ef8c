// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Starts are chosen one after the other, each after a pass over all tokens. An iteration is a pass over tokens and
// centroids (merge/cluster_panel.h), a merge by the map that this gives, and a step of the centroids; rows that have
// converged are left alone.
#include "merge/cluster_kmeans.h"

#include <algorithm>

#include "common/vector_math.h"
#include "merge/cluster_panel.h"

namespace tokred {
namespace {

constexpr int64_t kMaxRows = 192;  // of a task: no bit of the result depends on it

// The sum of squared differences of two rows, or of their products.
template <typename T>
TOKRED_CLONES float row_sum(const T* a, const T* b, int64_t dim, bool products) {
  float lanes[kLanes] = {};
  int64_t c = 0;
  if (products) {
    for (; c + kLanes <= dim; c += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<float>(a[c + l]) * static_cast<float>(b[c + l]);
    }
    for (int l = 0; c < dim; ++c, ++l) lanes[l] += static_cast<float>(a[c]) * static_cast<float>(b[c]);
  } else {
    for (; c + kLanes <= dim; c += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const float d = static_cast<float>(a[c + l]) - static_cast<float>(b[c + l]);
        lanes[l] += d * d;
      }
    }
    for (int l = 0; c < dim; ++c, ++l) {
      const float d = static_cast<float>(a[c]) - static_cast<float>(b[c]);
      lanes[l] += d * d;
    }
  }
  return sum_lanes(lanes);
}

// product[r, j] = row_term[r] col_term[j] product[r, j]
TOKRED_CLONES void scale_panel(int64_t rows, int64_t width, const float* row_term, const float* col_term,
                               float* product) {
  for (int64_t i = 0; i < rows; ++i) {
    const float term = row_term[i];
    for (int64_t j = 0; j < width; ++j) product[i * width + j] *= term * col_term[j];
  }
}

struct Scratch {
  Scratch(int64_t dim)
      : pairs(kMaxRows, dim),
        best(padded_lanes_of(kMaxRows) * kVecLanes),
        value(padded_lanes_of(kMaxRows)),
        best_col(padded_lanes_of(kMaxRows) * kVecLanes),
        col(padded_lanes_of(kMaxRows)) {}
  ClusterScratch pairs;
  AlignedBuffer<float> best, value;
  AlignedBuffer<int32_t> best_col, col;
};

template <typename T>
struct Kmeans {
  const ClusterKmeansArgs& a;

  const T* row(int64_t b, int64_t token) const {
    return static_cast<const T*>(a.x) + b * a.stride_batch + token * a.stride_token;
  }
  T* centroid(int64_t b, int64_t j) const { return static_cast<T*>(a.centroids) + (b * a.num_clusters + j) * a.dim; }
  const T* mean(int64_t b, int64_t j) const { return static_cast<const T*>(a.mean) + (b * a.num_clusters + j) * a.dim; }

  // body(batch row, first, last) for shares of rows of each batch row.
  template <typename Body>
  void for_rows(int64_t rows, int64_t per_task, const Body& body) const {
    const int64_t tasks = ceil_div(rows, per_task);
    parallel_for(a.batch_size * tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task % tasks * per_task;
        body(task / tasks, begin, std::min(begin + per_task, rows));
      }
    });
  }

  void find_terms() const {
    for_rows(a.num_tokens, kMaxRows, [&](int64_t b, int64_t begin, int64_t end) {
      ClusterScratch scratch(1, a.dim);
      float* term = a.term + b * a.num_tokens;
      squares_of_rows(ClusterRows<T>{row(b, begin), a.stride_token, nullptr, a.dim, a.dtype}, end - begin, scratch,
                      term + begin);
      for (int64_t i = begin; i < end; ++i) {
        term[i] = kmeans_term(a.cosine, term[i], a.drop_mask && a.drop_mask[b * a.num_tokens + i]);
      }
    });
  }

  // About 64k values of x a task.
  int64_t tokens_per_task() const { return 1 + 65536 / (a.dim + 16); }

  void choose_starts() const {
    const int64_t per_task = tokens_per_task(), tasks = ceil_div(a.num_tokens, per_task);
    AlignedBuffer<unsigned long long> best(a.batch_size * tasks + 1);
    for (int64_t step = 0; step < a.num_clusters; ++step) {
      for_rows(a.num_tokens, per_task, [&](int64_t b, int64_t begin, int64_t end) {
        const float* term = a.term + b * a.num_tokens;
        float* distance = a.distance + b * a.num_tokens;
        const int64_t last = step > 0 ? kmeans_token(a.pick[b * a.num_clusters + step - 1]) : -1;
        unsigned long long highest = 0;
        for (int64_t i = begin; i < end; ++i) {
          if (step == 0) distance[i] = __builtin_inff();
          if (last == i) {
            distance[i] = kKmeansPicked;
          } else if (last >= 0 && distance[i] != kKmeansPicked) {
            const float to =
                kmeans_distance(a.cosine, row_sum(row(b, i), row(b, last), a.dim, a.cosine), term[i], term[last]);
            distance[i] = to < distance[i] ? to : distance[i];
          }
          highest = std::max(highest, kmeans_pack(kmeans_start_key(a, step, i, term[i], distance[i]), i));
        }
        best[b * tasks + begin / per_task] = highest;
      });
      for (int64_t b = 0; b < a.batch_size; ++b) {
        a.pick[b * a.num_clusters + step] =
            tasks > 0 ? *std::max_element(best.data() + b * tasks, best.data() + (b + 1) * tasks) : 0;
      }
    }
    for (int64_t b = 0; b < a.batch_size; ++b) {
      for (int64_t j = 0; j < a.num_clusters; ++j) {
        const int64_t token = kmeans_start(a.pick + b * a.num_clusters, j);
        if (token >= 0) {
          std::copy_n(row(b, token), a.dim, centroid(b, j));
        } else {
          std::fill_n(centroid(b, j), a.dim, T(0.f));
        }
      }
    }
  }

  // Of rows that have not converged, or of all.
  void assign(bool all) const {
    for_rows(a.num_clusters, kMaxRows, [&](int64_t b, int64_t begin, int64_t end) {
      if (!all && a.done[b]) return;
      ClusterScratch scratch(1, a.dim);
      float* term = a.centroid_term + b * a.num_clusters;
      squares_of_rows(ClusterRows<T>{centroid(b, begin), a.dim, nullptr, a.dim, a.dtype}, end - begin, scratch,
                      term + begin);
      for (int64_t j = begin; j < end; ++j) term[j] = kmeans_term(a.cosine, term[j], false);
    });
    for_rows(a.num_tokens, cluster_block_rows(a.num_tokens, kMaxRows), [&](int64_t b, int64_t begin, int64_t end) {
      if (!all && a.done[b]) return;
      Scratch s(a.dim);
      const int64_t rows = end - begin;
      const float* row_term = a.term + b * a.num_tokens + begin;
      const ClusterRows<T> tokens{row(b, begin), a.stride_token, nullptr, a.dim, a.dtype};
      const ClusterRows<T> centroids{centroid(b, 0), a.dim, nullptr, a.dim, a.dtype};
      start_best(rows, s.best.data(), s.best_col.data());
      for_each_panel(tokens, rows, centroids, a.num_clusters, s.pairs, [&](float* product, int64_t width, int64_t col) {
        float col_term[kMaxDotColumns];
        const int64_t here = std::min(width, a.num_clusters - col);
        std::copy_n(a.centroid_term + b * a.num_clusters + col, here, col_term);
        std::fill(col_term + here, col_term + width, __builtin_nanf(""));
        (a.cosine ? scale_panel : panel_distances)(rows, width, row_term, col_term, product);
        fold_best(product, rows, width, static_cast<int32_t>(col), s.best.data(), s.best_col.data());
      });
      best_of_lanes(s.best.data(), s.best_col.data(), rows, s.value.data(), s.col.data());
      std::copy_n(s.col.data(), rows, a.dst_idx + b * a.num_tokens + begin);
    });
  }

  // The member most similar to each mean.
  void find_medoids() const {
    parallel_for(a.batch_size, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        if (a.done[b]) continue;
        unsigned long long* pick = a.pick + b * a.num_clusters;
        std::fill_n(pick, a.num_clusters, 0ull);
        for (int64_t i = 0; i < a.num_tokens; ++i) {
          const int64_t j = a.dst_idx[b * a.num_tokens + i];
          if (j < 0) continue;
          const float sum = row_sum(row(b, i), mean(b, j), a.dim, a.cosine);
          pick[j] = std::max(pick[j], kmeans_pack(kmeans_medoid_key(a, sum, a.term[b * a.num_tokens + i]), i));
        }
      }
    });
  }

  void move() const {
    parallel_for(a.batch_size, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        if (a.done[b]) continue;
        float moved = 0.f;
        for (int64_t j = 0; j < a.num_clusters; ++j) {
          if (a.mean_size[b * a.num_clusters + j] == 0.f) continue;  // an empty cluster stays where it is
          const T* to = a.medoid ? row(b, kmeans_token(a.pick[b * a.num_clusters + j])) : mean(b, j);
          moved += row_sum(to, const_cast<const T*>(centroid(b, j)), a.dim, false);
          std::copy_n(to, a.dim, centroid(b, j));
        }
        ++a.num_iter[b];
        a.done[b] = __builtin_sqrtf(moved) <= a.tol;
      }
    });
  }

  void run() const {
    std::fill_n(a.done, a.batch_size, 0);
    std::fill_n(a.num_iter, a.batch_size, 0);
    find_terms();
    if (a.init == KmeansInit::kGiven) {
      std::copy_n(static_cast<const T*>(a.starts), a.batch_size * a.num_clusters * a.dim, centroid(0, 0));
    } else {
      choose_starts();
    }
    for (int64_t i = 0; i < a.max_iter && std::count(a.done, a.done + a.batch_size, 0) > 0; ++i) {
      assign(false);
      segment_merge_cpu(a.merging());
      if (a.medoid) find_medoids();
      move();
    }
    assign(true);
    std::fill_n(a.num_members, a.batch_size * a.num_clusters, 0);
    for (int64_t b = 0; b < a.batch_size; ++b) {
      for (int64_t i = 0; i < a.num_tokens; ++i) {
        const int64_t j = a.dst_idx[b * a.num_tokens + i];
        if (j >= 0) ++a.num_members[b * a.num_clusters + j];
      }
    }
  }
};

}  // namespace

void cluster_kmeans_cpu(const ClusterKmeansArgs& args) {
  dispatch_float(args.dtype, [&](auto tag) { Kmeans<typename decltype(tag)::type>{args}.run(); });
}

}  // namespace tokred
