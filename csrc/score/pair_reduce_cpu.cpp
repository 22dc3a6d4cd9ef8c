// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per block of x rows and share of y (common/pair_panel.h); each row sums the function of its similarities in
// sixteen lanes, a vector of a panel at a time. Then one task per block of rows finishes them.
#include "score/pair_reduce.h"

#include <cmath>

#include "common/pair_panel.h"

namespace tokred {
namespace {

constexpr float kLowest = -3.4e38f;  // the largest logit of nobody: finite, so that differences are

// A row's sums so far, by lanes.
struct Lanes {
  float first[kVecLanes], second[kVecLanes], third[kVecLanes];  // as in PairReduceArgs::partial
};

TOKRED_INLINE void keep_bits(Vec16& value, const Vec16i& bits) {
  Vec16i raw;
  std::memcpy(&raw, &value, sizeof(raw));
  raw &= bits;
  std::memcpy(&value, &raw, sizeof(value));
}
// value = bits ? value : other
TOKRED_INLINE void select_bits(Vec16& value, const Vec16& other, const Vec16i& bits) {
  Vec16i a, b;
  std::memcpy(&a, &value, sizeof(a));
  std::memcpy(&b, &other, sizeof(b));
  a = (a & bits) | (b & ~bits);
  std::memcpy(&value, &a, sizeof(value));
}

template <PairFunction kFunction>
TOKRED_INLINE void apply(Vec16& value, float param) {
  const Vec16 zero = {};
  if constexpr (kFunction == PairFunction::kCountAbove) {
    const Vec16i above = value > zero + param;
    value = zero + 1.f;
    keep_bits(value, above);
  } else if constexpr (kFunction == PairFunction::kEluMargin) {
    value -= param;
    Vec16 below = value;
    exp16(below);
    below -= 1.f;
    const Vec16i positive = value > zero;
    select_bits(value, below, positive);
  } else if constexpr (kFunction == PairFunction::kGauss) {
    value = (1.f - value) / param;
    value = value * value * -0.5f;
    exp16(value);
  }
}

// Folds a panel's similarities into their rows. meets: -1 where they count, else 0.
template <PairFunction kFunction>
TOKRED_CLONES void fold_panel(const float* value, const int32_t* meets, int64_t rows, int64_t width, float param,
                              Lanes* lanes) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec16 first, second, third;
    load16(lanes[i].first, first);
    load16(lanes[i].second, second);
    load16(lanes[i].third, third);
    for (int64_t j = 0; j < width; j += kVecLanes) {
      Vec16 v;
      Vec16i bits;
      load16(value + i * width + j, v);
      std::memcpy(&bits, meets + i * width + j, sizeof(bits));
      if constexpr (kFunction == PairFunction::kSoftmaxMean) {
        Vec16 logit = v / param, largest = logit;
        const Vec16i rises = (logit > first) & bits;
        select_bits(largest, first, rises);
        Vec16 scale = first - largest, weight = logit - largest;
        exp16(scale);
        exp16(weight);
        keep_bits(weight, bits);
        keep_bits(v, bits);
        first = largest;
        second = second * scale + weight;
        third = third * scale + weight * v;
      } else {
        apply<kFunction>(v, param);
        Vec16 one = Vec16{} + 1.f;
        keep_bits(v, bits);
        keep_bits(one, bits);
        first += v;
        second += one;
      }
    }
    store16(lanes[i].first, first);
    store16(lanes[i].second, second);
    store16(lanes[i].third, third);
  }
}

using Fold = void (*)(const float*, const int32_t*, int64_t, int64_t, float, Lanes*);
Fold fold_of(PairFunction function) {
  switch (function) {
    case PairFunction::kCountAbove:
      return fold_panel<PairFunction::kCountAbove>;
    case PairFunction::kSoftmaxMean:
      return fold_panel<PairFunction::kSoftmaxMean>;
    case PairFunction::kEluMargin:
      return fold_panel<PairFunction::kEluMargin>;
    case PairFunction::kGauss:
      return fold_panel<PairFunction::kGauss>;
    default:
      return fold_panel<PairFunction::kSum>;
  }
}

// The lanes of a row as one state.
void join_lanes(const Lanes& lanes, bool softmax, double* state) {
  state[0] = softmax ? kLowest : 0;
  state[1] = state[2] = 0;
  for (int l = 0; l < kVecLanes; ++l) {
    if (softmax) {
      state[0] = lanes.first[l] > state[0] ? lanes.first[l] : state[0];
    } else {
      state[0] += lanes.first[l];
      state[1] += lanes.second[l];
    }
  }
  for (int l = 0; softmax && l < kVecLanes; ++l) {
    const double scale = std::exp(lanes.first[l] - state[0]);
    state[1] += lanes.second[l] * scale;
    state[2] += lanes.third[l] * scale;
  }
}

}  // namespace

void pair_reduce_cpu(const PairReduceArgs& args) {
  const PairInputs& in = args.in;
  const std::vector<PairBlock> blocks = pair_blocks(in);
  const int64_t num_blocks = static_cast<int64_t>(blocks.size()), shares = choose_policy(args).num_shares;
  const bool softmax = args.function == PairFunction::kSoftmaxMean;
  const Fold fold = fold_of(args.function);
  std::vector<double> partial(static_cast<size_t>(pair_reduce_partial_size(args)));
  const auto state_of = [&](int64_t share, int64_t row) {
    return partial.data() + (share * in.total_x() + row) * kPairReduceState;
  };
  parallel_for(num_blocks * shares, 1, [&](int64_t first, int64_t last) {
    PairPanels panels(in);
    AlignedBuffer<Lanes> lanes(pair_block_rows(in));
    for (int64_t task = first; task < last; ++task) {
      const PairBlock& block = blocks[static_cast<size_t>(task / shares)];
      const PairSequence s = pair_sequence(in, block.batch);
      const int64_t share = task % shares, rows = block.end - block.begin, width = dot_columns();
      const int64_t share_rows = pair_share_rows(s.num_y), end = std::min(s.num_y, (share + 1) * share_rows);
      if (share * share_rows >= s.num_y) continue;
      for (int64_t i = 0; i < rows; ++i) {
        std::fill_n(lanes[i].first, kVecLanes, softmax ? kLowest : 0.f);
        std::fill_n(lanes[i].second, kVecLanes, 0.f);
        std::fill_n(lanes[i].third, kVecLanes, 0.f);
      }
      panels.pack_x(s, block.begin, block.end);
      for (int64_t begin = share * share_rows; begin < end; begin += width) {
        const int64_t count = std::min(width, end - begin);
        const float* value = panels.meet(s, begin, count, nullptr);
        fold(value, panels.find_meets(s, begin, count), rows, width, args.param, lanes.data());
      }
      for (int64_t i = 0; i < rows; ++i) join_lanes(lanes[i], softmax, state_of(share, s.x_row + block.begin + i));
    }
  });
  parallel_for(num_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const PairBlock& block = blocks[static_cast<size_t>(b)];
      const PairSequence s = pair_sequence(in, block.batch);
      const int64_t num_shares = s.num_y > 0 ? pair_num_shares(s.num_y) : 0;
      for (int64_t row = s.x_row + block.begin; row < s.x_row + block.end; ++row) {
        args.out[row] =
            pair_finish(args.function, num_shares, [&](int64_t share, int i) { return state_of(share, row)[i]; });
      }
    }
  });
}

}  // namespace tokred
