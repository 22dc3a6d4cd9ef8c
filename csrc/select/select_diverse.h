// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One greedy loop serves every rule. A token's state is what it has of the picks so far: its largest similarity to one
// of them (max_min, mmr) or the sum of all (max_sum); a pick folds its row of similarities into every state, and the
// next pick is the token of the largest value. States of tokens that have no similarity at all (NaN, infinity) are NaN.
#pragma once
#include "common/dispatch.h"
#include "common/ragged.h"

namespace tokred {

enum class DiverseRule : int8_t { kMaxMin, kMaxSum, kMmr };
enum class DiverseMetric : int8_t { kCosine, kL2 };
enum class DiverseStart : int8_t { kFarthest, kWeight, kFirst, kGiven };

// Scores as they came; the widening is exact.
struct ScorePtr {
  const void* data = nullptr;
  DType dtype = DType::kF32;

  TOKRED_HOST_DEVICE float operator[](int64_t i) const {
    if (dtype == DType::kF32) return static_cast<const float*>(data)[i];
    if (dtype == DType::kF16) return static_cast<float>(static_cast<const c10::Half*>(data)[i]);
    return static_cast<float>(static_cast<const c10::BFloat16*>(data)[i]);
  }
};

struct SelectDiverseArgs {
  const void* x;              // [batch_size, num_tokens, dim] or, packed, [num_tokens, dim]; last dim contiguous
  ScorePtr weight;            // [batch_size, num_tokens] or [num_tokens], last dim contiguous; null: none
  const float* positions;     // as weight, [..., 3], contiguous; null: none
  const uint8_t* drop_mask;   // as weight, contiguous, 0 or 1; null: none is excluded
  IndexPtr start_idx;         // [batch_size], for kGiven
  const int32_t* cu_seqlens;  // [batch_size + 1]; null: dense
  int64_t* kept_idx;          // [batch_size, k], -1 past num_kept
  int32_t* num_kept;          // [batch_size]
  float* value;               // [batch_size, k], -inf past num_kept
  int64_t batch_size;
  int64_t num_tokens;  // of a sequence when dense, of all sequences when packed
  int64_t max_seqlen;  // longest sequence that is looked at; num_tokens when dense
  int64_t dim, k, picks_per_step;
  int64_t stride_batch, stride_token;  // of x, in elements
  int64_t stride_weight;               // between sequences, in elements; 0 when packed
  float lam, position_weight;
  DiverseRule rule;
  DiverseMetric metric;
  DiverseStart start;
  bool by_index;  // order of kept_idx: ascending, else as picked
  DType dtype;    // of x
  // CUDA only:
  float* term;        // [batch_size, max_seqlen], see diverse_similarity
  uint32_t* nearest;  // [batch_size, max_seqlen], key of the largest similarity to another token; null: not needed
  float* gram;        // [sequences of a group, max_seqlen, max_seqlen], similarities; null: rows are made when picked
  float* rows;        // [3, batch_size, max_seqlen] where gram is null: a row of similarities, states, folded states
  int32_t* pick;      // [batch_size, max_seqlen] where gram is null
};

constexpr float kDiverseEps = 1e-12f;  // smallest norm that is divided by
constexpr float kDiverseInf = __builtin_inff(), kDiverseNaN = __builtin_nanf("");

// One rounding: the compiler may not fuse it with an addition, so that every device has the same value.
TOKRED_HOST_DEVICE float diverse_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// A token's part in its similarities: 1 / norm for cosine, the squared norm for L2, NaN where that is no finite number.
TOKRED_HOST_DEVICE float diverse_term(DiverseMetric metric, float squares, float norm) {
  if (!(squares < kDiverseInf)) return kDiverseNaN;
  return metric == DiverseMetric::kL2 ? squares : 1.f / (norm < kDiverseEps ? kDiverseEps : norm);
}
// Added to the term: NaN unless a coordinate is finite.
TOKRED_HOST_DEVICE float diverse_zero_if_finite(float coordinate) {
  return coordinate - coordinate == 0.f ? 0.f : kDiverseNaN;
}
// Similarity of two tokens: the cosine, or minus the squared distance.
TOKRED_HOST_DEVICE float diverse_similarity(DiverseMetric metric, float dot, float a, float b) {
  if (metric == DiverseMetric::kCosine) return dot * a * b;
  const float negative = 2.f * dot - (a + b);
  return negative > 0.f ? 0.f : negative;  // NaN stays
}

// A sum over no pick is 0; the largest of no similarities is below all.
TOKRED_HOST_DEVICE float diverse_initial(DiverseRule rule) { return rule == DiverseRule::kMaxSum ? 0.f : -kDiverseInf; }
// The state after one more pick. A similarity that is NaN (the pick's fault) is passed over; a NaN state stays.
TOKRED_HOST_DEVICE float diverse_fold(DiverseRule rule, float state, float similarity) {
  if (rule == DiverseRule::kMaxSum) return similarity == similarity ? state + similarity : state;
  return similarity > state ? similarity : state;
}

// Distance = scale.base - similarity, of which positions take a share.
struct DiverseScale {
  float base;     // similarity of a token to itself
  float feature;  // share of the feature similarity
};
TOKRED_HOST_DEVICE DiverseScale diverse_scale(const SelectDiverseArgs& a) {
  const float feature = a.positions ? 1.f - a.position_weight : 1.f;
  return {a.metric == DiverseMetric::kCosine ? feature : 0.f, feature};
}
TOKRED_HOST_DEVICE float diverse_geometry(float dx, float dy, float dz) {
  return diverse_product(dx, dx) + diverse_product(dy, dy) + diverse_product(dz, dz);  // the squared distance
}
// Similarity with positions; per_distance is position_weight over the largest distance from the first pick.
TOKRED_HOST_DEVICE float diverse_with_position(float similarity, float feature, float distance, float per_distance) {
  return diverse_product(feature, similarity) - diverse_product(per_distance, distance);
}
TOKRED_HOST_DEVICE float diverse_per_distance(float position_weight, float largest) {
  return largest > 0.f ? position_weight / largest : 0.f;
}

// What the next pick is the largest of.
TOKRED_HOST_DEVICE float diverse_value(DiverseRule rule, float base, float lam, float state, bool weighted,
                                       float weight) {
  if (rule == DiverseRule::kMaxSum) return -state;
  if (rule == DiverseRule::kMmr) return diverse_product(lam, weight) - diverse_product(1.f - lam, state);
  return weighted ? diverse_product(weight, base - state) : base - state;
}

TOKRED_HOST_DEVICE TokenSpan diverse_span(const SelectDiverseArgs& a, int64_t batch_idx) {
  return token_span(a.cu_seqlens, a.num_tokens, a.max_seqlen, batch_idx);
}
// Where a sequence's weights, masks and positions begin, in tokens.
TOKRED_HOST_DEVICE int64_t diverse_first_token(const SelectDiverseArgs& a, int64_t batch_idx, const TokenSpan& span) {
  return a.cu_seqlens ? span.begin : batch_idx * a.num_tokens;
}

// The similarities of up to this many tokens are kept whole: 64 MiB of float32.
constexpr int64_t kDiverseGramTokens = 4096;
constexpr int64_t kDiverseGramBytes = kDiverseGramTokens * kDiverseGramTokens * 4;

// The CPU's tile of similarities, rows x rows, out of a sequence's own length: its bits do not depend on its batch.
// Small enough that half of a symmetric product saves nearly half, large enough that ATen's product is at its full
// rate.
constexpr int64_t kDiverseMaxTile = 160;
constexpr int64_t kDiverseStripRows = 32;  // rows that are made at a time where only picked ones are needed
constexpr int64_t diverse_tile(int64_t num_tokens) {
  const int64_t tiles = ceil_div(num_tokens < 1 ? int64_t{1} : num_tokens, kDiverseMaxTile);
  return ceil_div(ceil_div(num_tokens < 1 ? int64_t{1} : num_tokens, tiles), int64_t{16}) * 16;
}

constexpr int kDiverseBlockRows = 64, kDiverseBlockCols = 128;  // of a CUDA block's tile
constexpr int kDiversePrepareThreads = 256;                     // one warp per token
constexpr int kDiverseMaxThreads = 1024;
constexpr int kDiverseStreamThreads =
    512;  // of a block that multiplies rows itself: with 1024 it would spill registers
constexpr int64_t kDiverseGroupBytes = int64_t{1} << 30;  // of the similarities of the sequences that run together

struct SelectDiversePolicy {
  bool vector_loads;   // 16 bytes at a time; else one value
  bool gram;           // similarities are kept whole
  int64_t tiles;       // blocks per sequence of the product; 0: no product
  int64_t group_size;  // sequences that run together
  int threads, items;  // of the block that picks; tokens per thread in registers, 0: states in global memory
};
// Tiles that reach the diagonal or lie above it: those of a column of tiles follow each other.
constexpr int64_t diverse_tiles(int64_t num_tokens) {
  const int64_t columns = ceil_div(num_tokens, int64_t{kDiverseBlockCols});
  return columns * (columns + 1);
}
constexpr SelectDiversePolicy choose_policy(const SelectDiverseArgs& a, uint64_t address) {
  const uint64_t bytes = static_cast<uint64_t>(element_size(a.dtype));
  const uint64_t all = address | static_cast<uint64_t>(a.dim) * bytes | static_cast<uint64_t>(a.stride_token) * bytes |
                       static_cast<uint64_t>(a.batch_size > 1 ? a.stride_batch : 0) * bytes;
  const int64_t n = a.max_seqlen;
  const bool gram = n <= kDiverseGramTokens;
  const int items = !gram ? 0 : n <= kDiverseMaxThreads ? 1 : 4;
  const int64_t threads = gram ? ceil_div(ceil_div(n, int64_t{items}), int64_t{32}) * 32 : kDiverseStreamThreads;
  const int64_t room = n > 0 ? std::max<int64_t>(kDiverseGroupBytes / (4 * n * n), 1) : 1;
  return {all % 16 == 0,
          gram,
          gram || a.start == DiverseStart::kFarthest ? diverse_tiles(n) : 0,
          gram ? std::min(a.batch_size, room) : a.batch_size,
          static_cast<int>(std::max<int64_t>(threads, 32)),
          items};
}

void select_diverse_cpu(const SelectDiverseArgs& args);
int select_diverse_cuda(const SelectDiverseArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
