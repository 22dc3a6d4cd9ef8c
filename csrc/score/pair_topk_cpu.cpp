// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per block of x rows and share of y (common/pair_panel.h). Each row keeps a heap of its best, with the worst
// on top: a panel's similarities are compared with it all at once, and a row is looked at only where one is larger.
// Heaps hold one 64-bit number per place, (key of the similarity, complement of the index), and live where idx will be.
#include "score/pair_topk.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "common/pair_panel.h"
#include "common/score_key.h"

namespace tokred {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
static_assert(kMaxDotColumns == 32, "a bit each");
constexpr int64_t kMaxSharedK = 64;  // longer lists of several shares would take much memory

// above[i]: a bit per column of row i that is above its threshold; all of them where that is NaN: take whatever comes.
TOKRED_CLONES void find_above(const float* value, int64_t rows, int64_t width, const float* threshold,
                              uint32_t* above) {
  for (int64_t i = 0; i < rows; ++i) {
    const float least = threshold[i];
    uint32_t bits = 0;
    for (int64_t j = 0; j < width; ++j) bits |= static_cast<uint32_t>(value[i * width + j] > least) << j;
    above[i] = least == least ? bits : ~0u;
  }
}

struct Lists {
  explicit Lists(int64_t rows) : threshold(rows), count(rows), above(rows) {}
  AlignedBuffer<float> threshold;  // the similarity of a full list's last place; NaN: any may enter
  AlignedBuffer<int64_t> count;
  AlignedBuffer<uint32_t> above;
};

void take(uint64_t* heap, int64_t k, uint64_t packed, int64_t& count, float& threshold) {
  if (count < k) {
    heap[count++] = packed;
  } else {
    if (packed < heap[0]) return;
    std::pop_heap(heap, heap + k, std::greater<>());
    heap[k - 1] = packed;
  }
  std::push_heap(heap, heap + count, std::greater<>());
  if (count < k) return;
  const uint32_t key = static_cast<uint32_t>(heap[0] >> 32);
  threshold = key > kKeyNaN ? key_score(key) : kNaN;
}

// Rows of the block against rows [first, last) of y; heaps: [rows, k], sorted best first on return, then zeros.
void fill_lists(const PairTopkArgs& a, const PairSequence& s, const PairBlock& block, int64_t first, int64_t last,
                PairPanels& panels, Lists& lists, uint64_t* heaps) {
  const int64_t rows = block.end - block.begin, width = dot_columns();
  std::fill_n(lists.threshold.data(), rows, kNaN);
  std::fill_n(lists.count.data(), rows, 0);
  panels.pack_x(s, block.begin, block.end);
  for (int64_t begin = first; begin < last; begin += width) {
    const int64_t count = std::min(width, last - begin);
    const float* value = panels.meet(s, begin, count, a.bias);
    find_above(value, rows, width, lists.threshold.data(), lists.above.data());
    const uint32_t exist = ~0u >> (kMaxDotColumns - count);
    for (int64_t i = 0; i < rows; ++i) {
      for (uint32_t left = lists.above[i] & exist; left != 0; left &= left - 1) {
        const int64_t j = __builtin_ctz(left);
        const float similarity = value[i * width + j];
        if (similarity <= lists.threshold[i]) continue;  // which has risen since
        if (!pair_meets(a.in, s, block.begin + i, begin + j)) continue;
        const uint64_t packed = uint64_t{score_key(similarity)} << 32 | ~static_cast<uint32_t>(begin + j);
        take(heaps + i * a.k, a.k, packed, lists.count[i], lists.threshold[i]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    uint64_t* heap = heaps + i * a.k;
    std::sort_heap(heap, heap + lists.count[i], std::greater<>());
    std::fill(heap + lists.count[i], heap + a.k, 0);
  }
}

void write_row(const PairTopkArgs& a, int64_t row, const uint64_t* list) {
  for (int64_t p = 0; p < a.k; ++p) {
    const uint64_t packed = list[p];
    a.value[row * a.k + p] =
        packed ? key_score(static_cast<uint32_t>(packed >> 32)) : -std::numeric_limits<float>::infinity();
    a.idx[row * a.k + p] = packed ? int64_t{~static_cast<uint32_t>(packed)} : -1;
  }
}

}  // namespace

void pair_topk_cpu(const PairTopkArgs& args) {
  if (args.k == 0) return;
  const std::vector<PairBlock> blocks = pair_blocks(args.in);
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  const int64_t shares = args.k > kMaxSharedK ? 1 : pair_shares(num_blocks, args.in.num_y);
  const int64_t block_rows = pair_block_rows(args.in), size = block_rows * args.k;  // of a share's lists of a block
  std::vector<uint64_t> partial(static_cast<size_t>(shares > 1 ? num_blocks * shares * size : 0));
  parallel_for(num_blocks * shares, 1, [&](int64_t first, int64_t last) {
    PairPanels panels(args.in);
    Lists lists(block_rows);
    for (int64_t task = first; task < last; ++task) {
      const PairBlock& block = blocks[static_cast<size_t>(task / shares)];
      const PairSequence s = pair_sequence(args.in, block.batch);
      const int64_t share = task % shares, row = s.x_row + block.begin;
      uint64_t* heaps =
          shares > 1 ? partial.data() + task * size : reinterpret_cast<uint64_t*>(args.idx) + row * args.k;
      fill_lists(args, s, block, s.num_y * share / shares, s.num_y * (share + 1) / shares, panels, lists, heaps);
      for (int64_t i = 0; shares == 1 && i < block.end - block.begin; ++i) write_row(args, row + i, heaps + i * args.k);
    }
  });
  if (shares == 1) return;
  parallel_for(num_blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> all(static_cast<size_t>(shares * args.k));
    for (int64_t b = first; b < last; ++b) {
      const PairBlock& block = blocks[static_cast<size_t>(b)];
      const int64_t row = pair_sequence(args.in, block.batch).x_row + block.begin;
      for (int64_t i = 0; i < block.end - block.begin; ++i) {
        for (int64_t share = 0; share < shares; ++share) {
          std::copy_n(partial.data() + (b * shares + share) * size + i * args.k, args.k, all.data() + share * args.k);
        }
        std::partial_sort(all.begin(), all.begin() + args.k, all.end(), std::greater<>());
        write_row(args, row + i, all.data());
      }
    }
  });
}

}  // namespace tokred
