// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/block_summary.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_heads, kv_len, dim, block_size;
  bool minmax = false;
  bool lens = false;    // dense
  bool packed = false;  // kv_len tokens in all
  int64_t lead = 0;     // elements before k
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.kv_len * 7 + c.dim));
  const int64_t batches = c.packed ? 1 : c.batch_size, num_blocks = ceil_div(c.kv_len, c.block_size);
  const Buffer<T> k(side, random.normals<T>(batches * c.num_heads * c.kv_len * c.dim), c.lead);
  const Buffer<int32_t> kv_lens(side, random.whole<int32_t>(c.batch_size, -1, c.kv_len + 5));
  std::vector<int32_t> ends(static_cast<size_t>(c.batch_size) + 1);
  for (size_t b = 0; b < ends.size(); ++b) {  // empty sequences, one beyond the tokens
    ends[b] = static_cast<int32_t>(static_cast<int64_t>(b / 2 * 2) * (c.kv_len + 3) / (c.batch_size + 1));
  }
  const Buffer<int32_t> cu_seqlens(side, ends);
  const int64_t values = c.batch_size * c.num_heads * num_blocks * c.dim;
  const Buffer<T> low(side, values), high(side, c.minmax ? values : 0);

  BlockSummaryArgs a{};
  a.k = k.data();
  a.kv_lens = c.lens ? kv_lens.data() : nullptr;
  a.cu_seqlens = c.packed ? cu_seqlens.data() : nullptr;
  a.low = low.data();
  a.high = c.minmax ? high.data() : nullptr;
  a.batch_size = c.batch_size;
  a.num_heads = c.num_heads;
  a.dim = c.dim;
  a.kv_len = a.max_seqlen = c.kv_len;
  a.block_size = c.block_size;
  a.num_blocks = num_blocks;
  a.k_batch = c.packed ? 0 : c.num_heads * c.kv_len * c.dim;
  a.k_head = c.packed ? c.dim : c.kv_len * c.dim;
  a.k_token = c.packed ? c.num_heads * c.dim : c.dim;
  a.dtype = dtype;
  TOKRED_RUN(side, block_summary, a);
  return Results().add("low", low).add("high", high);  // the same order of additions: equal bits
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (const bool minmax : {false, true}) {
        Case one = c;
        one.minmax = minmax;
        check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_heads, ", ", c.kv_len, ", ", c.dim, "] by ",
                   c.block_size, ", minmax ", minmax),
              [&](const Side& side) { return call<T>(one, dtype, side); });
      }
    });
  }
}

}  // namespace

TOKRED_TEST(block_summary, head_dims) {  // panels of 64, 16 and what is left; 16-byte loads and single values
  for (const int64_t dim : {1, 8, 15, 40, 64, 72, 128, 200}) {
    check_all({2, 2, 37, dim, 8});
    check_all({1, 2, 20, dim, 8, false, false, false, 1});
  }
}
TOKRED_TEST(block_summary, blocks) {
  for (const int64_t block_size : {1, 7, 9, 64, 300}) check_all({2, 2, 100, 24, block_size, false, true});
}
TOKRED_TEST(block_summary, packed) { check_all({5, 2, 90, 24, 16, false, false, true}); }
TOKRED_TEST(block_summary, empty) {
  check_all({0, 2, 10, 8, 4});
  check_all({2, 2, 0, 8, 4});
}
