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
#include <vector>

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

Tiling choose_tiling(const AttnReceivedArgs& a, const AttnSequence& s) {
  Tiling t;
  const int64_t rows = a.group() * s.q_len, kv_len = s.kv_len;
  int64_t most_rows = kMaxTileRows;
  while (most_rows > 32 && most_rows * kv_len > kResidentFloats) most_rows /= 2;
  t.resident = !a.lse_in && most_rows * kv_len <= kResidentFloats;
  if (!t.resident) most_rows = kMaxTileRows;
  t.num_tiles = std::max<int64_t>(1, ceil_div(rows, most_rows));
  t.tile_rows = std::max<int64_t>(8, round_up(ceil_div(rows, t.num_tiles), 8));
  t.num_panels = std::max<int64_t>(1, ceil_div(kv_len, kMaxPanelKeys));
  t.panel_keys = std::max<int64_t>(16, round_up(ceil_div(kv_len, t.num_panels), 16));
  t.depth = round_up(a.head_dim, 16);
  // Few heads leave threads without work: then the rows are cut, too, into 16 tasks per batch row.
  t.num_tasks = std::max<int64_t>(1, std::min(t.num_tiles, 16 / a.num_kv_heads));
  return t;
}

// Enough for each of some tilings.
struct ScratchSizes {
  int64_t q = 0, k = 0, logits = 0;
  void include(const Tiling& t) {
    q = std::max(q, t.tile_rows * t.depth);
    k = std::max(k, t.panel_keys * t.depth);
    logits = std::max(logits, t.tile_rows * t.panel_keys * (t.resident ? t.num_panels : 1));
  }
};
struct Scratch {
  explicit Scratch(const ScratchSizes& sizes) : q(sizes.q), k(sizes.k), logits(sizes.logits) {}
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
  Task(const AttnReceivedArgs& args, const AttnSequence& sequence, const Tiling& tiling, Scratch& scratch,
       int64_t kv_head, float* columns)
      : a_(args),
        of_(sequence),
        t_(tiling),
        s_(scratch),
        keys_(static_cast<const T*>(args.k) + of_.batch * args.stride_k.batch +
              kv_head / args.k_repeat * args.stride_k.head),
        kv_head_(kv_head),
        columns_(columns) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      first_row_ = tile * t_.tile_rows;
      num_rows_ = std::min(t_.tile_rows, a_.group() * of_.q_len - first_row_);
      if (num_rows_ > 0) run_tile();
    }
  }

 private:
  int64_t head(int64_t r) const { return kv_head_ * a_.group() + (first_row_ + r) / of_.q_len; }
  int64_t query(int64_t r) const { return (first_row_ + r) % of_.q_len; }
  // How many of the rows from r on are queries of one head, side by side in memory.
  int64_t run_of_head(int64_t r) const { return std::min(of_.q_len - query(r), num_rows_ - r); }

  PanelView panel(int64_t p) const {
    float* data = s_.logits.data() + (t_.resident ? p * t_.tile_rows * t_.panel_keys : 0);
    return {data, t_.panel_keys, num_rows_, p * t_.panel_keys, s_.sees};
  }

  void load_rows() {
    int64_t first = of_.kv_len, end = 0;
    for (int64_t r = 0; r < num_rows_; ++r) {
      s_.offset[r] = -kInf;
      s_.sum[r] = 0.f;
      s_.sees[r] = of_.visible(static_cast<int>(query(r)));
      first = std::min<int64_t>(first, s_.sees[r].begin);
      end = std::max<int64_t>(end, s_.sees[r].end);
    }
    first_panel_ = first / t_.panel_keys;
    end_panel_ = ceil_div(end, t_.panel_keys);
    const T* q = static_cast<const T*>(a_.q) + of_.batch * a_.stride_q.batch + of_.q_begin * a_.stride_q.token;
    for (int64_t r = 0; r < t_.tile_rows;) {
      const bool filler = r >= num_rows_;  // rows of zeros
      const int64_t run = filler ? t_.tile_rows - r : run_of_head(r);
      const T* src = filler ? q : q + head(r) * a_.stride_q.head + query(r) * a_.stride_q.token;
      pack_rows(src, a_.stride_q.token, filler ? 0 : run, a_.head_dim, run, t_.depth, a_.scale * kLog2e,
                s_.q.data() + r * t_.depth);
      r += run;
    }
  }

  // Keys of a panel into the scratch, zeros past the last and for those on no page.
  void load_keys(int64_t first, int64_t present) {
    // Keys that are side by side: of a page, or all.
    const int64_t page_size = a_.page_table ? int64_t{1} << a_.page_shift : of_.kv_len;
    for (int64_t c = 0, run; c < t_.panel_keys; c += run) {
      const int64_t key = first + c;
      run = c < present ? std::min(present - c, page_size - key % page_size) : t_.panel_keys - c;
      const int64_t row = c < present ? a_.key_row(of_, static_cast<int>(key)) : -1;
      pack_rows(keys_ + std::max<int64_t>(row, 0), a_.stride_k.token, row < 0 ? 0 : run, a_.head_dim, run, t_.depth,
                1.f, s_.k.data() + c * t_.depth);
    }
  }

  void multiply(int64_t p) {
    const int64_t first = p * t_.panel_keys, present = std::min(t_.panel_keys, of_.kv_len - first);
    load_keys(first, present);
    gemm_nt(s_.q.data(), s_.k.data(), panel(p).data, t_.tile_rows, t_.panel_keys, t_.depth);
    if (a_.adjusted()) {
      const float* bias = a_.key_bias
                              ? a_.key_bias + of_.batch * a_.bias_batch + kv_head_ * a_.bias_head + of_.k_begin + first
                              : nullptr;
      adjust(panel(p), a_.softcap * kLog2e, bias);
    }
    for (int64_t c = 0; a_.page_table && c < present; ++c) {
      if (a_.key_row(of_, static_cast<int>(first + c)) >= 0) continue;
      for (int64_t r = 0; r < num_rows_; ++r) panel(p).data[r * t_.panel_keys + c] = -kInf;
    }
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
      const int64_t h = head(r), i = of_.q_begin + query(r);
      const float lowered = add_sink(r);
      float lse = s_.sum[r] == 0.f ? -kInf : kLn2 * s_.offset[r] + std::log(s_.sum[r]);
      if (a_.lse_in) lse = a_.lse_in[of_.batch * a_.stride_lse_in.batch + h * a_.stride_lse_in.head + i];
      a_.lse[(of_.batch * a_.num_q_heads + h) * a_.q_len + i] = lse;
      s_.factor[r] =
          a_.q_weight ? a_.q_weight[of_.batch * a_.stride_weight.batch + h * a_.stride_weight.head + i] : 1.f;
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
  const AttnSequence& of_;
  const Tiling& t_;
  Scratch& s_;
  const T* const keys_;  // of the head; the sequence's begin with a_.key_row
  const int64_t kv_head_;
  float* const columns_;
  int64_t first_row_ = 0, num_rows_ = 0, first_panel_ = 0, end_panel_ = 0;
};

// A sequence with its place in a slab: a run of sequences whose tasks run side by side.
struct Planned {
  AttnSequence sequence;
  Tiling tiling;
  int64_t first_task, first_column;  // in the slab
  int64_t columns_per_task;
};
struct Slab {
  int64_t begin, end;  // sequences
  int64_t num_tasks = 0, num_columns = 0;
  ScratchSizes scratch{};
};

// 256 tasks at most and 64 MiB of their partial columns, or what one sequence has.
std::vector<Slab> cut(const AttnReceivedArgs& a, std::vector<Planned>& planned) {
  std::vector<Slab> slabs;
  for (int64_t b = 0; b < a.num_sequences(); ++b) {
    Planned p{a.sequence(b), {}, 0, 0, 0};
    p.tiling = choose_tiling(a, p.sequence);
    p.columns_per_task = a.group() * p.tiling.padded_keys();
    const int64_t tasks = a.num_kv_heads * p.tiling.num_tasks, columns = tasks * p.columns_per_task;
    if (slabs.empty() || slabs.back().num_tasks + tasks > 256 || slabs.back().num_columns + columns > kColumnFloats) {
      slabs.push_back({b, b});
    }
    Slab& slab = slabs.back();
    p.first_task = slab.num_tasks;
    p.first_column = slab.num_columns;
    slab.num_tasks += tasks;
    slab.num_columns += columns;
    slab.scratch.include(p.tiling);
    slab.end = b + 1;
    planned.push_back(p);
  }
  return slabs;
}

// The columns of one query head, added up, to received.
void write_received(const AttnReceivedArgs& a, const Planned& p, int64_t head, const float* columns) {
  const AttnSequence& s = p.sequence;
  const int64_t kv_head = head / a.group(), g = head % a.group(), num_tasks = p.tiling.num_tasks;
  columns += p.first_column + kv_head * num_tasks * p.columns_per_task + g * p.tiling.padded_keys();
  float* out = a.received + (s.batch * a.num_q_heads + head) * a.kv_len + s.k_begin;
  merge_parts(columns, num_tasks, p.columns_per_task, s.kv_len, a.max_reduce, out);
  if (!a.page_table) return;
  for (int key = 0; key < s.kv_len; ++key) {  // NaN of a query stays with the keys that it sees
    if (a.key_row(s, key) < 0) out[key] = 0.f;
  }
  std::fill(out + s.kv_len, out + a.kv_len, 0.f);
}

}  // namespace

void attn_received_cpu(const AttnReceivedArgs& a) {
  if (a.batch_dim() == 0 || a.num_q_heads == 0) return;
  std::vector<Planned> planned;
  const std::vector<Slab> slabs = cut(a, planned);
  int64_t most = 0;
  for (const Slab& slab : slabs) most = std::max(most, slab.num_columns);
  AlignedBuffer<float> columns(most);
  for (const Slab& slab : slabs) {
    const Planned* first = planned.data() + slab.begin;
    const Planned* last = planned.data() + slab.end;
    parallel_for_gemm(slab.num_tasks, [&](int64_t begin, int64_t end) {
      Scratch scratch(slab.scratch);
      dispatch_float(a.dtype, [&](auto tag) {
        for (int64_t i = begin; i < end; ++i) {
          const auto after = [](int64_t task, const Planned& p) { return task < p.first_task; };
          const Planned& p = *(std::upper_bound(first, last, i, after) - 1);
          const Tiling& t = p.tiling;
          const int64_t task = i - p.first_task, part = task % t.num_tasks, kv_head = task / t.num_tasks;
          float* mine = columns.data() + p.first_column + task * p.columns_per_task;
          std::fill(mine, mine + p.columns_per_task, 0.f);
          Task<typename decltype(tag)::type>(a, p.sequence, t, scratch, kv_head, mine)
              .run(t.num_tiles * part / t.num_tasks, t.num_tiles * (part + 1) / t.num_tasks);
        }
      });
    });
    const int64_t keys_each = a.kv_len / (a.packed() ? a.num_sequences() : 1);
    parallel_for((slab.end - slab.begin) * a.num_q_heads, 1 + 65536 / (keys_each + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        write_received(a, first[i / a.num_q_heads], i % a.num_q_heads, columns.data());
      }
    });
  }
}

}  // namespace tokred
