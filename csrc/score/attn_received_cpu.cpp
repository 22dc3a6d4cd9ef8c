// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A thread takes up to 128 rows (queries of the heads that share one K) and sees all keys in panels of up to 512:
// product, exponentials, column sums. While 4 MiB hold the exponentials of 32 rows, or of all where those are fewer,
// they stay in the thread's scratch until the column sums; for longer keys they are computed again, as on CUDA.
//
// Bits: tile shapes and the cut of the rows into tasks follow from the shapes of one batch row alone, and the columns
// of a head are added in the order of its tasks. So neither threads nor the rest of the batch matter.
#include <cmath>
#include <vector>

#include "common/dot_rows.h"
#include "common/gemm.h"
#include "common/gemm_bf16.h"
#include "score/attn_received.h"
#include "score/attn_received_panel.h"

namespace tokred {
namespace {

constexpr int64_t kMaxTileRows = 128, kMaxPanelKeys = 512;
constexpr int64_t kRowBlock = 4;              // rows that share the loads of a key that is not packed
constexpr int64_t kResidentFloats = 1 << 20;  // 4 MiB of logits per thread
constexpr int64_t kColumnFloats =
    16 << 20;  // 64 MiB of partial columns of all threads, unless one batch row needs more

constexpr int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

// How a tile is multiplied with keys: few rows by dot_rows, with each key where it lies; bfloat16 by gemm_nt_bf16,
// where the machine can; the others by gemm_nt, widened.
enum class Product { kDot, kBf16, kFloat };

// What is few, as measured: the less, the faster the other product is and the longer it takes to widen a key, which
// dot_rows does for each kRowBlock rows.
int64_t few_rows(DType dtype, bool bf16) { return bf16 ? 4 : dtype == DType::kF16 ? 8 : 24; }

struct Tiling {
  Product product;
  int64_t tile_rows, num_tiles;    // rows of a tile, a multiple of 8, or of kRowBlock, or 1
  int64_t panel_keys, num_panels;  // keys of a panel, a multiple of 16
  int64_t depth;                   // head_dim rounded up to 16
  int64_t num_tasks;               // per (batch, key head): each takes a run of tiles
  bool resident;                   // the logits of all panels are kept
  int64_t padded_keys() const { return panel_keys * num_panels; }
};

Tiling choose_tiling(const AttnReceivedArgs& a, const AttnSequence& s) {
  Tiling t;
  const int64_t rows = a.group() * s.q_len, kv_len = s.kv_len;
  const bool bf16 = a.dtype == DType::kBF16 && has_gemm_bf16();
  t.product = rows <= few_rows(a.dtype, bf16) ? Product::kDot : bf16 ? Product::kBf16 : Product::kFloat;
  const int64_t unit = t.product != Product::kDot ? 8 : rows <= 1 ? 1 : kRowBlock;
  int64_t most_rows = kMaxTileRows;
  while (most_rows > 32 && most_rows * kv_len > kResidentFloats) most_rows /= 2;
  t.resident = !a.lse_in && std::min(most_rows, round_up(rows, unit)) * kv_len <= kResidentFloats;
  if (!t.resident) most_rows = kMaxTileRows;
  t.num_tiles = std::max<int64_t>(1, ceil_div(rows, most_rows));
  t.tile_rows = std::max<int64_t>(unit, round_up(ceil_div(rows, t.num_tiles), unit));
  t.num_panels = std::max<int64_t>(1, ceil_div(kv_len, kMaxPanelKeys));
  t.panel_keys = std::max<int64_t>(16, round_up(ceil_div(kv_len, t.num_panels), 16));
  t.depth = round_up(a.head_dim, 16);
  // Few heads leave threads without work: then the rows are cut, too, into 16 tasks per batch row.
  t.num_tasks = std::max<int64_t>(1, std::min(t.num_tiles, 16 / a.num_kv_heads));
  return t;
}

// Enough for each of some tilings.
struct ScratchSizes {
  int64_t q = 0, k = 0, logits = 0, offsets = 0;
  void include(const Tiling& t) {
    const int64_t kept = t.tile_rows * (t.resident ? t.num_panels : 1);
    q = std::max(q, t.tile_rows * t.depth);
    if (t.product != Product::kDot) k = std::max(k, t.panel_keys * t.depth);
    logits = std::max(logits, kept * t.panel_keys);
    offsets = std::max(offsets, kept);
  }
};
struct Scratch {
  explicit Scratch(const ScratchSizes& sizes)
      : q(sizes.q), k(sizes.k), logits(sizes.logits), panel_offset(sizes.offsets) {}
  AlignedBuffer<float> q, k, logits;  // q and k are bfloat16 for Product::kBf16
  AlignedBuffer<int64_t> key_row{kMaxPanelKeys + kDotPadding};
  AlignedBuffer<float> panel_offset;  // what a resident panel's exponentials were made with, tile_rows each
  // Per row of the tile, on the base-2 scale of the logits: that of products times exponent_scale.
  float offset[kMaxTileRows];  // subtracted from a logit before 2^x: the running maximum, or the lse
  float sum[kMaxTileRows];     // of 2^(logit - offset)
  float factor[kMaxTileRows];  // times 2^(logit - offset) is weight * probability
  KeySpan sees[kMaxTileRows];
};

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
        queries_(static_cast<const T*>(args.q) + sequence.batch * args.stride_q.batch +
                 sequence.q_begin * args.stride_q.token),
        keys_(static_cast<const T*>(args.k) + of_.batch * args.stride_k.batch +
              kv_head / args.k_repeat * args.stride_k.head),
        kv_head_(kv_head),
        columns_(columns) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      first_row_ = tile * t_.tile_rows;
      num_rows_ = std::min(t_.tile_rows, a_.group() * of_.q_len - first_row_);
      last_ = tile + 1 == end;
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

  float* panel_offset(int64_t p) const { return s_.panel_offset.data() + p * t_.tile_rows; }

  // rows of count (the others zeros), head_dim values each, to place from row first on.
  void pack(const T* src, int64_t stride, int64_t count, int64_t rows, int64_t first, float* place) const {
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      if (t_.product == Product::kBf16) {
        auto* to = reinterpret_cast<c10::BFloat16*>(place) + first * t_.depth;
        return pack_rows_bf16(src, stride, count, a_.head_dim, rows, t_.depth, to);
      }
    }
    pack_rows(src, stride, count, a_.head_dim, rows, t_.depth, 1.f, place + first * t_.depth);
  }

  // First rows of the next head, which this thread is likely to turn to: each would be waited for.
  void fetch_next_head() const {
    const T* q = queries_ + (head(num_rows_ - 1) + 1) * a_.stride_q.head;
    for (int64_t r = 0; r < std::min<int64_t>(of_.q_len, t_.tile_rows); ++r) {
      prefetch(q + r * a_.stride_q.token, a_.head_dim * static_cast<int64_t>(sizeof(T)));
    }
    const int64_t keys = std::min<int64_t>(of_.kv_len, t_.product == Product::kDot ? kAhead : t_.panel_keys);
    for_each_run(0, keys, [&](int64_t, int64_t run, int64_t row) {
      const T* k = keys_ + a_.stride_k.head + row;
      for (int64_t i = 0; row >= 0 && i < run; ++i) {
        prefetch(k + i * a_.stride_k.token, a_.head_dim * static_cast<int64_t>(sizeof(T)));
      }
    });
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
    for (int64_t r = 0; r < t_.tile_rows;) {
      const bool filler = r >= num_rows_;  // rows of zeros
      const int64_t run = filler ? t_.tile_rows - r : run_of_head(r);
      const T* src = filler ? queries_ : queries_ + head(r) * a_.stride_q.head + query(r) * a_.stride_q.token;
      pack(src, a_.stride_q.token, filler ? 0 : run, run, r, s_.q.data());
      r += run;
    }
    if (t_.product == Product::kDot) {
      for (int64_t r = 0; r < num_rows_; ++r) arrange_query<T>(a_.head_dim, s_.q.data() + r * t_.depth);
    }
  }

  // f(c, run, row) for keys [c, c + run) of a panel, which lie side by side from row on, or on no page if that is -1.
  template <typename F>
  void for_each_run(int64_t first, int64_t present, const F& f) const {
    const int64_t page_size = a_.page_table ? int64_t{1} << a_.page_shift : of_.kv_len;
    for (int64_t c = 0, run; c < present; c += run) {
      run = std::min(present - c, page_size - (first + c) % page_size);
      f(c, run, a_.key_row(of_, static_cast<int>(first + c)));
    }
  }

  // Keys of a panel into the scratch, zeros past the last and for those on no page.
  void load_keys(int64_t first, int64_t present) {
    for_each_run(first, present, [&](int64_t c, int64_t run, int64_t row) {
      pack(keys_ + std::max<int64_t>(row, 0), a_.stride_k.token, row < 0 ? 0 : run, run, c, s_.k.data());
    });
    pack(keys_, 0, 0, t_.panel_keys - present, present, s_.k.data());
  }

  // Whether a panel needs no packing for gemm_nt_bf16.
  bool whole_panel(int64_t first, int64_t present) const {
    return present == t_.panel_keys && a_.head_dim == t_.depth && !a_.page_table &&
           (reinterpret_cast<uintptr_t>(keys_ + a_.key_row(of_, static_cast<int>(first))) |
            static_cast<uintptr_t>(a_.stride_k.token * 2)) %
                   4 ==
               0;
  }

  // Where the keys of a panel lie, and the next ones, for dot_rows to fetch; keys on no page borrow another's place.
  // False if none is on a page.
  bool find_keys(int64_t first, int64_t present) {
    int64_t* const rows = s_.key_row.data();
    const int64_t listed = std::min(present + kAhead, of_.kv_len - first);
    int64_t readable = -1;
    bool all = true;
    for_each_run(first, listed, [&](int64_t c, int64_t run, int64_t row) {
      const int64_t step = row < 0 ? 0 : a_.stride_k.token;
      for (int64_t i = 0, place = row; i < run; ++i, place += step) rows[c + i] = place;
      readable = std::max(readable, row);
      all = all && row >= 0;
    });
    for (int64_t c = 0; !all && c < listed; ++c) rows[c] = rows[c] < 0 ? readable : rows[c];
    std::fill(rows + listed, rows + present + kDotPadding, readable);
    return readable >= 0;
  }
  template <int kRows>
  void dot(int64_t present, float* out) {
    for (int64_t c = 0; c < present; c += kKeyBlock) {
      for (int64_t r = 0; r < t_.tile_rows; r += kRows) {
        dot_rows<T, kRows>(keys_, s_.key_row.data(), c, std::min(c + kKeyBlock, present), s_.q.data() + r * t_.depth,
                           t_.depth, a_.head_dim, r == 0, out + r * t_.panel_keys, t_.panel_keys);
      }
    }
  }

  void multiply(int64_t p) {
    const int64_t first = p * t_.panel_keys, present = std::min(t_.panel_keys, of_.kv_len - first);
    float* const out = panel(p).data;
    const bool few = t_.product == Product::kDot, readable = !few || find_keys(first, present);
    const bool in_place = t_.product == Product::kBf16 && whole_panel(first, present);
    if (!few && !in_place) load_keys(first, present);
    if (last_ && p + 1 == end_panel_) fetch_next_head();
    if (few && readable) {
      t_.tile_rows == 1 ? dot<1>(present, out) : dot<kRowBlock>(present, out);
    } else if (t_.product == Product::kBf16) {
      const void* k =
          in_place ? static_cast<const void*>(keys_ + a_.key_row(of_, static_cast<int>(first))) : s_.k.data();
      gemm_nt_bf16(reinterpret_cast<const c10::BFloat16*>(s_.q.data()), static_cast<const c10::BFloat16*>(k),
                   in_place ? a_.stride_k.token : t_.depth, out, t_.tile_rows, t_.panel_keys, t_.depth);
    } else if (t_.product == Product::kFloat) {
      gemm_nt(s_.q.data(), s_.k.data(), out, t_.tile_rows, t_.panel_keys, t_.depth);
    }
    if (a_.adjusted()) {
      const float* bias = a_.key_bias
                              ? a_.key_bias + of_.batch * a_.bias_batch + kv_head_ * a_.bias_head + of_.k_begin + first
                              : nullptr;
      adjust(panel(p), a_.scale * kLog2e, a_.softcap * kLog2e, bias);
    }
    for (int64_t c = 0; a_.page_table && c < present; ++c) {
      if (a_.key_row(of_, static_cast<int>(first + c)) >= 0) continue;
      for (int64_t r = 0; r < num_rows_; ++r) out[r * t_.panel_keys + c] = -kInf;
    }
  }

  // After this, offset and sum hold each row's maximum and sum; resident panels hold their exponentials.
  void sum_rows() {
    float before[kMaxTileRows];
    for (int64_t p = first_panel_; p < end_panel_; ++p) {
      multiply(p);
      std::copy(s_.offset, s_.offset + num_rows_, before);
      raise_offsets(panel(p), a_.exponent_scale, s_.offset);
      change_offset(before, s_.offset, num_rows_, s_.sum);
      exponentiate(panel(p), a_.exponent_scale, s_.offset, s_.sum);
      if (t_.resident) std::copy(s_.offset, s_.offset + num_rows_, panel_offset(p));
    }
  }

  void add_sink(int64_t r) {
    const float sink = a_.sink ? a_.sink[head(r)] * kLog2e : -kInf;
    if (sink == -kInf) return;
    const float highest = sink > s_.offset[r] ? sink : s_.offset[r];
    s_.sum[r] = s_.sum[r] * std::exp2(s_.offset[r] - highest) + std::exp2(sink - highest);
    s_.offset[r] = highest;
  }

  // The lse out, and what the column sums need. A row whose lse is -inf contributes nothing.
  void finish_rows() {
    for (int64_t r = 0; r < num_rows_; ++r) {
      const int64_t h = head(r), i = of_.q_begin + query(r);
      add_sink(r);
      float lse = s_.sum[r] == 0.f ? -kInf : kLn2 * s_.offset[r] + std::log(s_.sum[r]);
      if (a_.lse_in) lse = a_.lse_in[of_.batch * a_.stride_lse_in.batch + h * a_.stride_lse_in.head + i];
      a_.lse[(of_.batch * a_.num_q_heads + h) * a_.q_len + i] = lse;
      s_.factor[r] =
          a_.q_weight ? a_.q_weight[of_.batch * a_.stride_weight.batch + h * a_.stride_weight.head + i] : 1.f;
      if (lse == -kInf) {
        s_.sees[r] = {};
        s_.factor[r] = 0.f;
      } else if (t_.resident) {
        s_.factor[r] /= s_.sum[r];
      } else {
        s_.offset[r] = a_.lse_in ? lse * kLog2e : s_.offset[r] + std::log2(s_.sum[r]);
      }
    }
  }

  void add_panel(int64_t p) {
    const auto add = a_.max_reduce ? (t_.resident ? add_columns<true, false> : add_columns<true, true>)
                                   : (t_.resident ? add_columns<false, false> : add_columns<false, true>);
    float factor[kMaxTileRows];
    std::copy(s_.factor, s_.factor + num_rows_, factor);
    if (t_.resident) change_offset(panel_offset(p), s_.offset, num_rows_, factor);
    for (int64_t r = 0, run; r < num_rows_; r += run) {
      run = run_of_head(r);
      float* columns = columns_ + (head(r) - kv_head_ * a_.group()) * t_.padded_keys() + p * t_.panel_keys;
      add(panel(p), r, r + run, a_.exponent_scale, s_.offset, factor, columns);
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
  const T* const queries_;  // of the sequence
  const T* const keys_;     // of the head; the sequence's begin with a_.key_row
  const int64_t kv_head_;
  float* const columns_;
  int64_t first_row_ = 0, num_rows_ = 0, first_panel_ = 0, end_panel_ = 0;
  bool last_ = false;  // tile of the run
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
