// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per (batch, kv head, split of the keys), or per (batch, split) where heads are summed: it walks them in
// order. Each row of K is read once for all query rows of its head, 64 at a time.
#include "common/qk_rows.h"

#include <limits>

#include "common/dot_bf16.h"
#include "common/dot_rows.h"

namespace tokred {
namespace {

constexpr int64_t kSplit = 512;   // keys of a task
constexpr int64_t kMaxRows = 64;  // query rows at a time; bounds the scratch
constexpr int64_t kRowBlock = 4;
constexpr int64_t kScoreStride = kSplit + kKeyBlock;
constexpr float kInf = std::numeric_limits<float>::infinity();

TOKRED_CLONES void write_scores(const float* logit, int64_t count, float scale, bool relu, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = logit[i] * scale;
    out[i] = relu && x < 0.f ? 0.f : x;
  }
}
TOKRED_CLONES void add_scores(const float* logit, int64_t count, float scale, bool relu, float weight, bool first,
                              float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = logit[i] * scale, score = weight * (relu && x < 0.f ? 0.f : x);
    out[i] = first ? score : out[i] + score;
  }
}

struct Scratch {
  explicit Scratch(int64_t head_dim)
      : q_stride(ceil_div(head_dim, kDotBf16Step) * kDotBf16Step),
        q(kMaxRows * q_stride),
        q_bf16(kMaxRows * q_stride) {}
  int64_t q_stride;
  AlignedBuffer<float> q;
  AlignedBuffer<c10::BFloat16> q_bf16;  // instead of q
  AlignedBuffer<float> score{kMaxRows * kScoreStride};
};

// The keys of one split: offsets of their rows from the first of a head.
struct Keys {
  AlignedBuffer<int64_t> offset{kSplit + kDotPadding};
  AlignedBuffer<bool> missing{kSplit};  // on a page that does not exist: read in vain, then -inf
  int64_t begin = 0, size = 0;          // positions
  int64_t count = 0;                    // of which that many may be read
  bool any_missing = false;

  TokenSpan span{};  // of the batch entry

  void load(const QkRows& a, int64_t batch_idx, int64_t split) {
    span = a.keys(batch_idx);
    begin = split * kSplit;
    size = std::clamp<int64_t>(a.num_logits(span) - begin, 0, kSplit);
    count = std::clamp<int64_t>(span.len - begin, 0, size);
    any_missing = false;
    int64_t readable = -1;
    for (int64_t i = 0; i < count;) {  // a page at a time; dense storage is one
      const int64_t position = begin + i, left = (int64_t{1} << a.pages.shift) - (position & page_mask(a));
      const int64_t run = std::min(left, count - i);
      const int32_t slot = a.pages.slot(batch_idx, position);
      const int64_t first = slot < 0 ? -1 : a.k.slot_offset(slot, a.pages.shift) + span.begin * a.k.stride_token;
      for (int64_t j = 0; j < run; ++j) {
        offset[i + j] = first + j * a.k.stride_token;
        missing[i + j] = slot < 0;
      }
      if (slot < 0) any_missing = true;
      if (slot >= 0) readable = first;
      i += run;
    }
    if (any_missing && readable < 0) count = 0;
    for (int64_t i = 0; any_missing && i < count; ++i) {
      if (missing[i]) offset[i] = readable;
    }
    for (int64_t i = count; count > 0 && i < count + kDotPadding; ++i) offset[i] = offset[count - 1];
  }
  static int64_t page_mask(const QkRows& a) { return (int64_t{1} << a.pages.shift) - 1; }

  void finish(float* out) const {
    for (int64_t i = 0; any_missing && i < count; ++i) {
      if (missing[i]) out[i] = -kInf;
    }
    for (int64_t i = count; i < size; ++i) out[i] = -kInf;
  }
};

// Copies a row of q, with zeros in the channels that are not listed.
template <typename T>
void load_row(const QkRows& a, const T* q, int64_t kv_head, T* out) {
  if (!a.use_channels) {
    std::memcpy(static_cast<void*>(out), q, static_cast<size_t>(a.k.dim) * sizeof(T));
    return;
  }
  std::memset(static_cast<void*>(out), 0, static_cast<size_t>(a.k.dim) * sizeof(T));
  const int64_t list = a.channel_heads == 1 ? 0 : kv_head * a.num_channels;
  for (int64_t i = 0; i < a.num_channels; ++i) {
    const int64_t channel = a.channels[list + i];
    if (channel >= 0 && channel < a.k.dim) out[channel] = q[channel];
  }
}

// Logits of query rows [first, first + rows) of a head, row head * q_len + token, to s.score.
template <typename T, int kRows>
void score_rows(const QkRows& a, const Keys& keys, int64_t batch_idx, int64_t kv_head, int64_t first, int64_t rows,
                Scratch& s) {
  constexpr bool kBf16 = std::is_same_v<T, c10::BFloat16>;
  const bool as_given = kBf16 && has_dot_bf16();
  const int64_t padded = ceil_div(rows, int64_t{kRows}) * kRows;
  const auto clear = [&](auto* q) { std::fill_n(q, padded * s.q_stride, std::decay_t<decltype(*q)>(0.f)); };
  as_given ? clear(s.q_bf16.data()) : clear(s.q.data());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = kv_head * a.group() + (first + r) / a.q_len, token = (first + r) % a.q_len;
    const T* q = static_cast<const T*>(a.q) + batch_idx * a.q_batch + head * a.q_head + token * a.q_token;
    T row[kQkRowsMaxHeadDim];
    load_row(a, q, kv_head, row);
    if (as_given) {
      std::memcpy(static_cast<void*>(s.q_bf16.data() + r * s.q_stride), row, static_cast<size_t>(a.k.dim) * sizeof(T));
    } else {
      load_query(row, a.k.dim, 1.f, s.q.data() + r * s.q_stride);
    }
  }
  const T* k = static_cast<const T*>(a.k.data) + a.k.head_offset(batch_idx, kv_head);
  for (int64_t i = 0; i < keys.count; i += kKeyBlock) {
    const int64_t end = std::min(i + kKeyBlock, keys.count);
    for (int64_t r = 0; r < padded; r += kRows) {
      float* score = s.score.data() + r * kScoreStride;
      if constexpr (kBf16) {
        if (as_given) {
          dot_rows_bf16<kRows>(k, keys.offset.data(), i, end, s.q_bf16.data() + r * s.q_stride, s.q_stride, a.k.dim,
                               r == 0, score, kScoreStride);
          continue;
        }
      }
      dot_rows<T, kRows>(k, keys.offset.data(), i, end, s.q.data() + r * s.q_stride, s.q_stride, a.k.dim, r == 0, score,
                         kScoreStride);
    }
  }
}

template <typename T>
void score_head(const QkRows& a, const Keys& keys, int64_t batch_idx, int64_t kv_head, Scratch& s) {
  const int64_t group_rows = a.group() * a.q_len;
  for (int64_t first = 0; first < group_rows; first += kMaxRows) {
    const int64_t rows = std::min(kMaxRows, group_rows - first);
    // One row needs no padding to four; more than one share their loads.
    rows == 1 ? score_rows<T, 1>(a, keys, batch_idx, kv_head, first, rows, s)
              : score_rows<T, kRowBlock>(a, keys, batch_idx, kv_head, first, rows, s);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = kv_head * a.group() + (first + r) / a.q_len, token = (first + r) % a.q_len;
      const float* logit = s.score.data() + r * kScoreStride;
      if (a.sum_heads) {
        add_scores(logit, keys.count, a.scale, a.relu, a.weight(batch_idx, token, head), head == 0,
                   a.out + (batch_idx * a.q_len + token) * a.kv_len + keys.begin);
      } else {
        float* out = a.out + a.logits_at(batch_idx, head, keys.span) + token * a.logits_stride() + keys.begin;
        write_scores(logit, keys.count, a.scale, a.relu, out);
        keys.finish(out);
      }
    }
  }
}

}  // namespace

void qk_rows_cpu(const QkRows& a) {
  if (a.batch_size == 0 || a.num_q_heads == 0 || a.q_len == 0 || a.kv_len == 0) return;
  const int64_t splits = ceil_div(a.kv_len, kSplit), heads = a.sum_heads ? 1 : a.num_kv_heads;
  const int64_t heads_per_task = a.num_kv_heads / heads;
  // A task of 16 KiB of rows takes about a microsecond; smaller ones are grouped.
  const int64_t bytes = std::min(a.kv_len, kSplit) * heads_per_task * a.k.dim * element_size(a.dtype);
  const int64_t grain = 1 + (int64_t{128} << 10) / (bytes + 1024);
  parallel_for(a.batch_size * heads * splits, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(a.k.dim);
    Keys keys;
    dispatch_float(a.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch_idx = i / splits / heads, first_head = i / splits % heads;
        keys.load(a, batch_idx, i % splits);
        for (int64_t h = 0; h < heads_per_task; ++h) score_head<T>(a, keys, batch_idx, first_head + h, scratch);
        for (int64_t token = 0; a.sum_heads && token < a.q_len; ++token) {
          keys.finish(a.out + (batch_idx * a.q_len + token) * a.kv_len + keys.begin);
        }
      }
    });
  });
}

}  // namespace tokred
