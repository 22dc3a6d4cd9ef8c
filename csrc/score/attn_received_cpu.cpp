// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A thread takes up to 128 rows (queries of the heads that share one K) and sees all keys in panels of up to 512:
// product, exponentials, column sums. While 4 MiB hold the logits of 32 rows or more, they stay in the thread's scratch
// between the row sums and the column sums; for longer keys they are computed again, as on CUDA.
//
// Bits: tile shapes and the cut of the rows into tasks follow from the shapes of one batch row alone, and the columns
// of a head are added in the order of its tasks. So neither threads nor the rest of the batch matter.
#include <cmath>
#include <limits>

#include "common/gemm.h"
#include "common/vector_math.h"
#include "score/attn_received.h"

namespace tokred {
namespace {

constexpr int64_t kMaxTileRows = 128, kMaxPanelKeys = 512;
constexpr int64_t kResidentFloats = 1 << 20;  // 4 MiB of logits per thread
constexpr int64_t kColumnFloats =
    16 << 20;  // 64 MiB of partial columns of all threads, unless one batch row needs more
constexpr float kInf = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

struct Tiling {
  int64_t tile_rows, num_tiles;    // rows of a tile, a multiple of 8
  int64_t panel_keys, num_panels;  // keys of a panel, a multiple of 16
  int64_t depth;                   // head_dim rounded up to 16
  int64_t num_tasks;               // per (batch, key head): each takes a run of tiles
  bool resident;                   // the logits of all panels are kept
  int64_t padded_keys() const { return panel_keys * num_panels; }
};

Tiling choose_tiling(const AttnReceivedArgs& a) {
  Tiling t;
  int64_t most_rows = kMaxTileRows;
  while (most_rows > 32 && most_rows * a.kv_len > kResidentFloats) most_rows /= 2;
  t.resident = !a.lse_in && most_rows * a.kv_len <= kResidentFloats;
  if (!t.resident) most_rows = kMaxTileRows;
  t.num_tiles = std::max<int64_t>(1, ceil_div(a.rows(), most_rows));
  t.tile_rows = std::max<int64_t>(8, round_up(ceil_div(a.rows(), t.num_tiles), 8));
  t.num_panels = std::max<int64_t>(1, ceil_div(a.kv_len, kMaxPanelKeys));
  t.panel_keys = std::max<int64_t>(16, round_up(ceil_div(a.kv_len, t.num_panels), 16));
  t.depth = round_up(a.head_dim, 16);
  // Few heads leave threads without work: then the rows are cut, too, into 16 tasks per batch row.
  t.num_tasks = std::max<int64_t>(1, std::min(t.num_tiles, 16 / a.num_kv_heads));
  return t;
}

struct Scratch {
  explicit Scratch(const Tiling& t)
      : q(t.tile_rows * t.depth),
        k(t.panel_keys * t.depth),
        logits(t.tile_rows * t.panel_keys * (t.resident ? t.num_panels : 1)) {}
  AlignedBuffer<float> q, k, logits;
  // Per row of the tile, on the base-2 scale of the logits.
  float offset[kMaxTileRows];  // subtracted from a logit before 2^x: the running maximum, or the lse
  float sum[kMaxTileRows];     // of 2^(logit - offset)
  float factor[kMaxTileRows];  // times 2^(logit - offset) is weight * probability
  KeySpan sees[kMaxTileRows];
};

// The logits of a tile's rows for the keys of a panel, of which row r sees those that seen_in gives.
struct PanelView {
  float* data;
  int64_t keys;  // also the stride
  int64_t rows, first_key;
  const KeySpan* sees;
};
struct Span {  // columns [begin, end) of a panel
  int64_t begin, end;
};
TOKRED_INLINE Span seen_in(const PanelView& p, int64_t r) {
  const int64_t begin = p.sees[r].begin - p.first_key, end = p.sees[r].end - p.first_key;
  return {begin < 0 ? 0 : begin, end < p.keys ? end : p.keys};
}
// A row's last elements, filled up to kLanes with -inf.
TOKRED_INLINE void load_tail(const float* row, int64_t count, float (&tail)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) tail[i] = -kInf;
  for (int64_t i = 0; i < count; ++i) tail[i] = row[i];
}

// Logits x of keys seen, on the base-2 scale, become cap * tanh(x / cap), unless cap is 0, plus bias, unless that is
// null.
TOKRED_CLONES void adjust(const PanelView& panel, float cap, const float* bias) {
  const float over_cap = 1.f / cap;
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Span seen = seen_in(panel, r);
    float* row = panel.data + r * panel.keys;
    if (cap > 0) {
      for (int64_t c = seen.begin; c < seen.end; ++c) row[c] = cap * poly_tanh(row[c] * over_cap);
    }
    if (bias) {
      for (int64_t c = seen.begin; c < seen.end; ++c) row[c] += bias[c] * kLog2e;
    }
  }
}

// Raises offset to the maximum of each row; NaN is ignored here and met again in the sum.
TOKRED_CLONES void raise_offsets(const PanelView& panel, float* offset) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Span seen = seen_in(panel, r);
    if (seen.begin >= seen.end) continue;
    const float* row = panel.data + r * panel.keys + seen.begin;
    const int64_t count = seen.end - seen.begin;
    float lanes[kLanes], tail[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = offset[r];
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
      for (int i = 0; i < kLanes; ++i) lanes[i] = row[c + i] > lanes[i] ? row[c + i] : lanes[i];
    }
    load_tail(row + c, count - c, tail);
    for (int i = 0; i < kLanes; ++i) lanes[i] = tail[i] > lanes[i] ? tail[i] : lanes[i];
    offset[r] = max_lanes(lanes);
  }
}

// Logits of keys seen become 2^(logit - offset); their sum is added to sum.
TOKRED_CLONES void exponentiate(const PanelView& panel, const float* offset, float* sum) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Span seen = seen_in(panel, r);
    if (seen.begin >= seen.end) continue;
    float* row = panel.data + r * panel.keys + seen.begin;
    const int64_t count = seen.end - seen.begin;
    // A row of -inf has offset -inf: with 0 in its place the exponentials are 0, not NaN.
    const float minus = offset[r] == -kInf ? 0.f : offset[r];
    float lanes[kLanes] = {}, tail[kLanes];
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        const float e = poly_exp2(row[c + i] - minus);
        row[c + i] = e;
        lanes[i] += e;
      }
    }
    load_tail(row + c, count - c, tail);
    for (int i = 0; i < kLanes; ++i) {
      tail[i] = poly_exp2(tail[i] - minus);
      // Beyond the tail: 0, or NaN if the offset is; the row's other terms are NaN then, too.
      lanes[i] += tail[i];
    }
    for (int64_t i = 0; c + i < count; ++i) row[c + i] = tail[i];
    sum[r] += sum_lanes(lanes);
  }
}

// columns[c] += factor * e, or the maximum of both (NaN if either is), over the rows and the keys each sees; e is the
// panel or, when kExp, 2^(panel - offset).
template <bool kMax, bool kExp>
TOKRED_CLONES void add_columns(const PanelView& panel, int64_t first_row, int64_t last_row, const float* offset,
                               const float* factor, float* __restrict columns) {
  for (int64_t r = first_row; r < last_row; ++r) {
    const Span seen = seen_in(panel, r);
    const float* __restrict row = panel.data + r * panel.keys;
    const float f = factor[r], minus = offset[r];
    for (int64_t c = seen.begin; c < seen.end; ++c) {
      const float p = f * (kExp ? poly_exp2(row[c] - minus) : row[c]);
      const float greater = p > columns[c] ? p : columns[c];
      columns[c] = kMax ? (p == p ? greater : p) : columns[c] + p;
    }
  }
}

// out := part 0, then part 1 and so on added to it, or their maximum.
TOKRED_CLONES void merge_parts(const float* parts, int64_t num_parts, int64_t stride, int64_t n, bool max, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = parts[i];
  for (int64_t p = 1; p < num_parts; ++p) {
    const float* part = parts + p * stride;
    if (max) {
      for (int64_t i = 0; i < n; ++i) out[i] = part[i] > out[i] || part[i] != part[i] ? part[i] : out[i];
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] += part[i];
    }
  }
}

// Adds runs of tiles of one key head's rows to columns [group, padded_keys].
template <typename T>
class Task {
 public:
  Task(const AttnReceivedArgs& args, const Tiling& tiling, Scratch& scratch, int64_t b, int64_t kv_head, float* columns)
      : a_(args), t_(tiling), s_(scratch), b_(b), kv_head_(kv_head), columns_(columns) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      first_row_ = tile * t_.tile_rows;
      num_rows_ = std::min(t_.tile_rows, a_.rows() - first_row_);
      if (num_rows_ > 0) run_tile();
    }
  }

 private:
  int64_t head(int64_t r) const { return kv_head_ * a_.group() + (first_row_ + r) / a_.q_len; }
  int64_t query(int64_t r) const { return (first_row_ + r) % a_.q_len; }
  // How many of the rows from r on are queries of one head, side by side in memory.
  int64_t run_of_head(int64_t r) const { return std::min(a_.q_len - query(r), num_rows_ - r); }

  PanelView panel(int64_t p) const {
    float* data = s_.logits.data() + (t_.resident ? p * t_.tile_rows * t_.panel_keys : 0);
    return {data, t_.panel_keys, num_rows_, p * t_.panel_keys, s_.sees};
  }

  void load_rows() {
    int64_t first = a_.kv_len, end = 0;
    for (int64_t r = 0; r < num_rows_; ++r) {
      s_.offset[r] = -kInf;
      s_.sum[r] = 0.f;
      s_.sees[r] = a_.visible(static_cast<int>(query(r)));
      first = std::min<int64_t>(first, s_.sees[r].begin);
      end = std::max<int64_t>(end, s_.sees[r].end);
    }
    first_panel_ = first / t_.panel_keys;
    end_panel_ = ceil_div(end, t_.panel_keys);
    const T* q = static_cast<const T*>(a_.q) + b_ * a_.stride_q.batch;
    for (int64_t r = 0; r < t_.tile_rows;) {
      const bool filler = r >= num_rows_;  // rows of zeros
      const int64_t run = filler ? t_.tile_rows - r : run_of_head(r);
      const T* src = filler ? q : q + head(r) * a_.stride_q.head + query(r) * a_.stride_q.token;
      pack_rows(src, a_.stride_q.token, filler ? 0 : run, a_.head_dim, run, t_.depth, a_.scale * kLog2e,
                s_.q.data() + r * t_.depth);
      r += run;
    }
  }

  void multiply(int64_t p) {
    const int64_t first = p * t_.panel_keys, present = std::min(t_.panel_keys, a_.kv_len - first);
    const T* k = static_cast<const T*>(a_.k) + b_ * a_.stride_k.batch + kv_head_ / a_.k_repeat * a_.stride_k.head;
    pack_rows(k + first * a_.stride_k.token, a_.stride_k.token, present, a_.head_dim, t_.panel_keys, t_.depth, 1.f,
              s_.k.data());
    gemm_nt(s_.q.data(), s_.k.data(), panel(p).data, t_.tile_rows, t_.panel_keys, t_.depth);
    if (!a_.adjusted()) return;
    const float* bias = a_.key_bias ? a_.key_bias + b_ * a_.bias_batch + kv_head_ * a_.bias_head + first : nullptr;
    adjust(panel(p), a_.softcap * kLog2e, bias);
  }

  // After this, offset and sum hold each row's maximum and sum; a resident tile holds its exponentials.
  void sum_rows() {
    float before[kMaxTileRows];
    for (int64_t p = first_panel_; p < end_panel_; ++p) {
      multiply(p);
      std::copy(s_.offset, s_.offset + num_rows_, before);
      raise_offsets(panel(p), s_.offset);
      if (t_.resident) continue;
      for (int64_t r = 0; r < num_rows_; ++r) {
        if (s_.offset[r] > before[r]) s_.sum[r] *= std::exp2(before[r] - s_.offset[r]);
      }
      exponentiate(panel(p), s_.offset, s_.sum);
    }
    if (!t_.resident) return;
    for (int64_t p = first_panel_; p < end_panel_; ++p) exponentiate(panel(p), s_.offset, s_.sum);
  }

  // Adds the sink to a row's sum. Returns what a resident row's exponentials have to be multiplied with from then on.
  float add_sink(int64_t r) {
    const float sink = a_.sink ? a_.sink[head(r)] * kLog2e : -kInf;
    if (sink == -kInf) return 1.f;
    const float highest = sink > s_.offset[r] ? sink : s_.offset[r], factor = std::exp2(s_.offset[r] - highest);
    s_.sum[r] = s_.sum[r] * factor + std::exp2(sink - highest);
    s_.offset[r] = highest;
    return factor;
  }

  // The lse out, and what the column sums need. A row whose lse is -inf contributes nothing.
  void finish_rows() {
    for (int64_t r = 0; r < num_rows_; ++r) {
      const int64_t h = head(r), i = query(r);
      const float lowered = add_sink(r);
      float lse = s_.sum[r] == 0.f ? -kInf : kLn2 * s_.offset[r] + std::log(s_.sum[r]);
      if (a_.lse_in) lse = a_.lse_in[b_ * a_.stride_lse_in.batch + h * a_.stride_lse_in.head + i];
      a_.lse[(b_ * a_.num_q_heads + h) * a_.q_len + i] = lse;
      s_.factor[r] = a_.q_weight ? a_.q_weight[b_ * a_.stride_weight.batch + h * a_.stride_weight.head + i] : 1.f;
      if (lse == -kInf) {
        s_.sees[r] = {};
        s_.factor[r] = 0.f;
      } else if (t_.resident) {
        s_.factor[r] = s_.factor[r] * lowered / s_.sum[r];
      } else {
        s_.offset[r] = a_.lse_in ? lse * kLog2e : s_.offset[r] + std::log2(s_.sum[r]);
      }
    }
  }

  void add_panel(int64_t p) {
    const auto add = a_.max_reduce ? (t_.resident ? add_columns<true, false> : add_columns<true, true>)
                                   : (t_.resident ? add_columns<false, false> : add_columns<false, true>);
    for (int64_t r = 0, run; r < num_rows_; r += run) {
      run = run_of_head(r);
      float* columns = columns_ + (head(r) - kv_head_ * a_.group()) * t_.padded_keys() + p * t_.panel_keys;
      add(panel(p), r, r + run, s_.offset, s_.factor, columns);
    }
  }

  void run_tile() {
    load_rows();
    if (!a_.lse_in) sum_rows();
    finish_rows();
    for (int64_t p = first_panel_; p < end_panel_; ++p) {
      if (!t_.resident) multiply(p);
      add_panel(p);
    }
  }

  const AttnReceivedArgs& a_;
  const Tiling& t_;
  Scratch& s_;
  const int64_t b_, kv_head_;
  float* const columns_;
  int64_t first_row_ = 0, num_rows_ = 0, first_panel_ = 0, end_panel_ = 0;
};

}  // namespace

void attn_received_cpu(const AttnReceivedArgs& a) {
  if (a.batch_size == 0 || a.num_q_heads == 0) return;
  const Tiling t = choose_tiling(a);
  const int64_t tasks_per_row = a.num_kv_heads * t.num_tasks;
  const int64_t columns_per_task = a.group() * t.padded_keys();
  // Partial columns for a slab of the batch at a time: 256 tasks at most, or what one batch row has.
  const int64_t slab =
      std::max<int64_t>(1, std::min(256 / tasks_per_row, kColumnFloats / (tasks_per_row * columns_per_task)));
  AlignedBuffer<float> columns(std::min(slab, a.batch_size) * tasks_per_row * columns_per_task);
  for (int64_t first = 0; first < a.batch_size; first += slab) {
    const int64_t count = std::min(slab, a.batch_size - first);
    parallel_for_gemm(count * tasks_per_row, [&](int64_t begin, int64_t end) {
      Scratch scratch(t);
      dispatch_float(a.dtype, [&](auto tag) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t part = i % t.num_tasks, kv_head = i / t.num_tasks % a.num_kv_heads;
          float* mine = columns.data() + i * columns_per_task;
          std::fill(mine, mine + columns_per_task, 0.f);
          Task<typename decltype(tag)::type>(a, t, scratch, first + i / tasks_per_row, kv_head, mine)
              .run(t.num_tiles * part / t.num_tasks, t.num_tiles * (part + 1) / t.num_tasks);
        }
      });
    });
    parallel_for(count * a.num_q_heads, 1 + 65536 / (a.kv_len + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {  // i = (batch * num_kv_heads + kv_head) * group + head of the group
        const int64_t kv_row = i / a.group(), g = i % a.group();
        merge_parts(columns.data() + kv_row * t.num_tasks * columns_per_task + g * t.padded_keys(), t.num_tasks,
                    columns_per_task, a.kv_len, a.max_reduce, a.received + (first * a.num_q_heads + i) * a.kv_len);
      }
    });
  }
}

}  // namespace tokred
