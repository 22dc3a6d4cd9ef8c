// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per (batch, list, split of the list). A task resolves its entries to row offsets first, so that rows can be
// prefetched well before they are needed, then runs over the K rows, the softmax, and the V rows. A row that is loaded
// serves four query rows from registers: decode reads far more than it computes, and a group shares its rows.
#include <cmath>
#include <limits>

#include "attend/attend_selected.h"
#include "common/dot_rows.h"

namespace tokred {
namespace {

constexpr int64_t kSplit = 512;   // list entries of a task; fixed, so that bits depend on nothing else
constexpr int64_t kMaxRows = 64;  // query rows at a time; bounds the scratch
constexpr int64_t kRowBlock = 4;
constexpr float kInf = std::numeric_limits<float>::infinity();

// One stretch of kCols vectors of the columns: acc[r] += sum over i of p[r][i] * v row i.
template <typename T, int kRows, int kCols>
TOKRED_INLINE void add_columns(const T* v, const int64_t* offset, int64_t begin, int64_t end, const float* p,
                               int64_t p_stride, bool fetch, float* acc, int64_t acc_stride) {
  Vec16 sum[kRows][kCols];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) load16(acc + r * acc_stride + c * kVecLanes, sum[r][c]);
  }
  for (int64_t i = begin; i < end; ++i) {
    const T* row = v + offset[i];
    if (fetch) prefetch(v + offset[i + kAhead], kCols * kVecLanes * static_cast<int64_t>(sizeof(T)));
    Vec16 value[kCols];
    if constexpr (kCols == 1) {
      load16(row, value[0]);
    } else {
#pragma GCC unroll 2
      for (int c = 0; c < kCols; c += 2) load32(row + c * kVecLanes, value[c], value[c + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kCols; ++c) sum[r][c] += value[c] * p[r * p_stride + i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) store16(acc + r * acc_stride + c * kVecLanes, sum[r][c]);
  }
}

// acc[r] += sum over i in [begin, end) of p[r][i] * v row i. acc: [kRows, acc_stride], a multiple of 16 columns;
// stretches of 32 in the order of load32.
template <typename T, int kRows>
TOKRED_CLONES void add_values(const T* v, const int64_t* offset, int64_t begin, int64_t end, const float* p,
                              int64_t p_stride, int64_t dim, bool fetch, float* acc, int64_t acc_stride) {
  int64_t c = 0;
  for (; c + 4 * kVecLanes <= dim; c += 4 * kVecLanes) {
    add_columns<T, kRows, 4>(v + c, offset, begin, end, p, p_stride, fetch, acc + c, acc_stride);
  }
  for (; c + 2 * kVecLanes <= dim; c += 2 * kVecLanes) {
    add_columns<T, kRows, 2>(v + c, offset, begin, end, p, p_stride, fetch, acc + c, acc_stride);
  }
  for (; c + kVecLanes <= dim; c += kVecLanes) {
    add_columns<T, kRows, 1>(v + c, offset, begin, end, p, p_stride, fetch, acc + c, acc_stride);
  }
  if (c == dim) return;
  for (int64_t i = begin; i < end; ++i) {
    Vec16 value;
    load_part(v + offset[i] + c, dim - c, value);
    for (int r = 0; r < kRows; ++r) {
      Vec16 sum;
      load16(acc + r * acc_stride + c, sum);
      sum += value * p[r * p_stride + i];
      store16(acc + r * acc_stride + c, sum);
    }
  }
}

// score[0, count) becomes e^(score - max); count is a multiple of 16. Returns the sum in *sum and the max, which
// ignores NaN and is -inf where there is no number above it.
TOKRED_CLONES float softmax_numerators(float* score, int64_t count, float* sum) {
  Vec16 max = Vec16{} - kInf;
  for (int64_t i = 0; i < count; i += kVecLanes) {
    Vec16 s;
    load16(score + i, s);
    max = s > max ? s : max;
  }
  float top = -kInf;
  for (int l = 0; l < kVecLanes; ++l) top = max[l] > top ? max[l] : top;
  const float shift = top == -kInf ? 0.f : top;  // -inf - -inf would be NaN
  Vec16 total = {};
  for (int64_t i = 0; i < count; i += kVecLanes) {
    Vec16 s;
    load16(score + i, s);
    s -= shift;
    exp16(s);
    store16(score + i, s);
    total += s;
  }
  float lanes[kVecLanes];
  store16(lanes, total);
  *sum = 0.f;
  for (int l = 0; l < kVecLanes; ++l) *sum += lanes[l];
  return top;
}

TOKRED_CLONES void scale_row(const float* x, int64_t count, float factor, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * factor;
}
TOKRED_CLONES void add_scaled_row(const float* x, int64_t count, float factor, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] += x[i] * factor;
}
template <typename T>
TOKRED_CLONES void finish_row(const float* acc, int64_t count, float factor, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = T(acc[i] * factor);
}
// The list entries of one split that name a row, packed to the front.
struct Entries {
  AlignedBuffer<int64_t> k_offset{kSplit + kDotPadding}, v_offset{kSplit + kDotPadding}, position{kSplit};
  int64_t count = 0;

  void load(const AttendSelectedArgs& a, int64_t batch_idx, int64_t list_head, int64_t split) {
    const int64_t list = (batch_idx * a.list_heads + list_head) * a.num_listed;
    const int64_t begin = split * kSplit, end = std::min(begin + kSplit, a.num_listed);
    const int64_t limit = kv_limit(a.kv_lens, a.kv_len, batch_idx);
    count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pos = a.kept_idx[list + i];
      const int32_t slot = attend_slot(a, batch_idx, pos, limit);
      if (slot < 0) continue;
      k_offset[count] = a.k.slot_offset(slot, a.pages.shift);
      v_offset[count] = a.v.slot_offset(slot, a.pages.shift);
      position[count++] = pos;
    }
    for (int64_t i = count; count && i < count + kDotPadding; ++i) {  // read in vain or fetched ahead
      k_offset[i] = k_offset[count - 1];
      v_offset[i] = v_offset[count - 1];
    }
  }
};

struct Scratch {
  Scratch(int64_t head_dim, int64_t head_dim_v)
      : q_stride(ceil_div(head_dim, int64_t{kVecLanes}) * kVecLanes),
        acc_stride(ceil_div(head_dim_v, int64_t{kVecLanes}) * kVecLanes),
        q(kMaxRows * q_stride),
        acc(kMaxRows * acc_stride),
        score(kMaxRows * kScoreStride) {}
  static constexpr int64_t kScoreStride = kSplit + kKeyBlock;
  int64_t q_stride, acc_stride;
  Entries entries;
  AlignedBuffer<float> q, acc, score;
};

struct Task {
  int64_t batch_idx, first_head, kv_head, split;
};

int64_t row_index(const AttendSelectedArgs& a, const Task& t, int64_t row) {  // in [batch, q head, q position]
  return (t.batch_idx * a.num_q_heads + t.first_head) * a.q_len + row;
}

template <typename T>
T* out_row(const AttendSelectedArgs& a, int64_t row) {
  const int64_t token = row % a.q_len, head = row / a.q_len % a.num_q_heads, batch = row / a.q_len / a.num_q_heads;
  return static_cast<T*>(a.out) + batch * a.out_batch + head * a.out_head + token * a.out_token;
}

// Scores, softmax numerators and weighted values of rows [first, first + rows) of a task's group, into s.acc and m, l.
template <typename T, int kRows>
void attend_rows(const AttendSelectedArgs& a, const Task& t, int64_t first, int64_t rows, Scratch& s, float* m,
                 float* l) {
  const int64_t padded = ceil_div(rows, int64_t{kRows}) * kRows, count = s.entries.count;
  constexpr int64_t stride = Scratch::kScoreStride;
  std::memset(s.q.data(), 0, static_cast<size_t>(padded * s.q_stride) * sizeof(float));
  std::memset(s.acc.data(), 0, static_cast<size_t>(padded * s.acc_stride) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = t.first_head + (first + r) / a.q_len, token = (first + r) % a.q_len;
    load_query(static_cast<const T*>(a.q) + t.batch_idx * a.q_batch + head * a.q_head + token * a.q_token, a.k.dim,
               a.scale, s.q.data() + r * s.q_stride);
  }
  const T* k = static_cast<const T*>(a.k.data) + a.k.head_offset(t.batch_idx, t.kv_head);
  const T* v = static_cast<const T*>(a.v.data) + a.v.head_offset(t.batch_idx, t.kv_head);
  for (int64_t i = 0; i < count; i += kKeyBlock) {
    for (int64_t r = 0; r < padded; r += kRows) {
      dot_rows<T, kRows>(k, s.entries.k_offset.data(), i, std::min(i + kKeyBlock, count), s.q.data() + r * s.q_stride,
                         s.q_stride, a.k.dim, r == 0, s.score.data() + r * stride, stride);
    }
  }
  for (int64_t i = 0; i < std::min(kAhead, count); ++i) {  // under way during the softmax
    prefetch(v + s.entries.v_offset[i], a.v.dim * static_cast<int64_t>(sizeof(T)));
  }
  const int64_t width = ceil_div(count, int64_t{kVecLanes}) * kVecLanes;
  for (int64_t r = 0; r < padded; ++r) {
    float* score = s.score.data() + r * stride;
    if (a.key_bias && r < rows) {
      const int64_t head = t.first_head + (first + r) / a.q_len;
      const int64_t bias_head = a.bias_heads == 1 ? 0 : a.bias_heads == a.num_q_heads ? head : t.kv_head;
      const float* bias = a.key_bias + t.batch_idx * a.bias_batch + bias_head * a.bias_head;
      for (int64_t i = 0; i < count; ++i) score[i] += bias[s.entries.position[i]];
    }
    for (int64_t i = count; i < width; ++i) score[i] = -kInf;
    m[r] = softmax_numerators(score, width, &l[r]);
  }
  for (int64_t i = 0; i < count; i += kKeyBlock) {
    for (int64_t r = 0; r < padded; r += kRows) {
      add_values<T, kRows>(v, s.entries.v_offset.data(), i, std::min(i + kKeyBlock, count), s.score.data() + r * stride,
                           stride, a.v.dim, r == 0, s.acc.data() + r * s.acc_stride, s.acc_stride);
    }
  }
  if constexpr (kDeinterleaves<T>) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c + 32 <= a.v.dim; c += 32) interleave32(s.acc.data() + r * s.acc_stride + c);
    }
  }
}

// out = acc / l and lse; l == 0 says that nothing was listed. A NaN sum stays NaN.
template <typename T>
void write_row(const AttendSelectedArgs& a, int64_t row, const float* acc, float m, float l) {
  finish_row(acc, a.v.dim, l == 0.f ? 0.f : 1.f / l, out_row<T>(a, row));
  a.lse[row] = l == 0.f ? -kInf : m + std::log(l);
}

template <typename T>
void run_task(const AttendSelectedArgs& a, const Task& t, int64_t num_splits, Scratch& s, float* partial) {
  const int64_t group_rows = attend_group(a) * a.q_len;
  float m[kMaxRows + kRowBlock], l[kMaxRows + kRowBlock];
  const int64_t list_head = a.list_heads == 1 ? 0 : a.list_heads == a.num_q_heads ? t.first_head : t.kv_head;
  s.entries.load(a, t.batch_idx, list_head, t.split);
  for (int64_t first = 0; first < group_rows; first += kMaxRows) {
    const int64_t rows = std::min(kMaxRows, group_rows - first);
    // One row needs no padding to four; more than one share their loads.
    rows == 1 ? attend_rows<T, 1>(a, t, first, rows, s, m, l) : attend_rows<T, kRowBlock>(a, t, first, rows, s, m, l);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row_index(a, t, first + r);
      const float* acc = s.acc.data() + r * s.acc_stride;
      if (num_splits == 1) {
        write_row<T>(a, row, acc, m[r], l[r]);
        continue;
      }
      float* to = partial + (row * num_splits + t.split) * (a.v.dim + 2);
      to[0] = m[r];
      to[1] = l[r];
      std::memcpy(to + 2, acc, static_cast<size_t>(a.v.dim) * sizeof(float));
    }
  }
}

// Splits merge in their order, whoever computed them.
template <typename T>
void combine_row(const AttendSelectedArgs& a, int64_t row, int64_t num_splits, const float* partial, float* acc) {
  const int64_t stride = a.v.dim + 2;
  const float* first = partial + row * num_splits * stride;
  float m = -kInf, l = 0.f;
  for (int64_t s = 0; s < num_splits; ++s) m = first[s * stride] > m ? first[s * stride] : m;
  const float shift = m == -kInf ? 0.f : m;
  for (int64_t s = 0; s < num_splits; ++s) {
    const float* part = first + s * stride;
    const float weight = std::exp(part[0] - shift);
    l += part[1] * weight;
    s == 0 ? scale_row(part + 2, a.v.dim, weight, acc) : add_scaled_row(part + 2, a.v.dim, weight, acc);
  }
  write_row<T>(a, row, acc, m, l);
}

}  // namespace

void attend_selected_cpu(const AttendSelectedArgs& a) {
  const int64_t rows = a.batch_size * a.num_q_heads * a.q_len;
  if (rows == 0) return;
  const int64_t num_splits = std::max<int64_t>(1, ceil_div(a.num_listed, kSplit));
  const int64_t group = attend_group(a), units = a.num_q_heads / group;
  AlignedBuffer<float> partial(num_splits == 1 ? 1 : rows * num_splits * (a.v.dim + 2));
  // A task of 16 KiB of rows takes about a microsecond; smaller ones are grouped.
  const int64_t bytes = std::min(a.num_listed, kSplit) * (a.k.dim + a.v.dim) * element_size(a.dtype);
  const int64_t grain = 1 + (int64_t{128} << 10) / (bytes + 1024);
  parallel_for(a.batch_size * units * num_splits, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(a.k.dim, a.v.dim);
    dispatch_float(a.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t unit = i / num_splits % units, first_head = unit * group;
        const Task task{i / num_splits / units, first_head, first_head / (a.num_q_heads / a.num_kv_heads),
                        i % num_splits};
        run_task<T>(a, task, num_splits, scratch, partial.data());
      }
    });
  });
  if (num_splits == 1) return;
  parallel_for(rows, 64, [&](int64_t begin, int64_t end) {
    AlignedBuffer<float> acc(a.v.dim);
    dispatch_float(a.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t row = begin; row < end; ++row) combine_row<T>(a, row, num_splits, partial.data(), acc.data());
    });
  });
}

}  // namespace tokred
