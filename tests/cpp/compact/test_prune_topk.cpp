// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/prune_topk.h"

#include <memory>

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_tokens, k;  // packed: num_tokens of all rows
  std::vector<int32_t> cu_seqlens = {};
  int64_t max_seqlen = 0;
  int keep_percent = 0, drop_percent = 0;  // of the tokens are forced, excluded
  std::vector<int64_t> row_bytes = {8};    // of x and companions
  int64_t lead = 0;                        // elements before x, rows off their natural alignment
};

template <typename T>
Results call(const Case& c, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens * 31 + c.k));
  const bool packed = !c.cu_seqlens.empty();
  const int64_t total = packed ? c.num_tokens : c.batch_size * c.num_tokens;
  std::vector<T> scores = random.whole<T>(total, -40, 40);  // ties at the cut in most rows
  for (size_t i = 0; i < scores.size(); i += 97) scores[i] = static_cast<T>(i % 2 ? NAN : -0.f);
  const auto mask = [&](int percent) {
    std::vector<uint8_t> bits = random.whole<uint8_t>(total, 0, 100);
    for (uint8_t& bit : bits) bit = bit < percent;
    return bits;
  };
  const Buffer<T> score(side, scores);
  const Buffer<uint8_t> keep(side, mask(c.keep_percent)), drop(side, mask(c.drop_percent));
  const Buffer<int32_t> cu_seqlens(side, c.cu_seqlens);
  const Buffer<int64_t> kept_idx(side, c.batch_size * c.k);
  const Buffer<int32_t> num_kept(side, c.batch_size);

  PruneTopkArgs args{};
  TopkRows& rows = args.rows;
  rows.score = score.data();
  rows.keep_mask = c.keep_percent ? keep.data() : nullptr;
  rows.drop_mask = c.drop_percent ? drop.data() : nullptr;
  rows.cu_seqlens = packed ? cu_seqlens.data() : nullptr;
  rows.kept_idx = kept_idx.data();
  rows.num_kept = num_kept.data();
  rows.num_rows = c.batch_size;
  rows.num_heads = 1;
  rows.num_tokens = c.num_tokens;
  rows.max_seqlen = packed ? c.max_seqlen : c.num_tokens;
  rows.k = c.k;
  rows.score_stride.batch = rows.keep_stride.batch = rows.drop_stride.batch = packed ? 0 : c.num_tokens;
  rows.dtype = dtype;
  std::vector<std::unique_ptr<Buffer<uint8_t>>> buffers;
  for (const int64_t row_bytes : c.row_bytes) {
    const auto from = random.whole<uint8_t>(total * row_bytes, 0, 256);
    buffers.push_back(std::make_unique<Buffer<uint8_t>>(side, from, c.lead));
    buffers.push_back(std::make_unique<Buffer<uint8_t>>(side, c.batch_size * c.k * row_bytes));
    RowTensor& tensor = args.tensors[args.num_tensors++];
    tensor.src = (buffers.end() - 2)->get()->bytes();
    tensor.dst = buffers.back()->bytes();
    tensor.row_bytes = row_bytes;
    tensor.src_batch = packed ? 0 : c.num_tokens * row_bytes;
    tensor.src_token = row_bytes;
  }
  const PruneTopkPolicy policy = choose_policy(rows.max_seqlen, rows.k);
  const Buffer<uint32_t> workspace(side, policy.fused ? 0 : topk_workspace_words(policy.select, rows.num_rows));
  rows.workspace = workspace.data();

  TOKRED_RUN(side, prune_topk, args);
  Results results;
  results.add("kept_idx", kept_idx).add("num_kept", num_kept);
  for (size_t i = 1; i < buffers.size(); i += 2) results.add("kept rows", *buffers[i]);
  return results;
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_tokens, "] keep ", c.k),
            [&](const Side& side) { return call<T>(c, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(prune_topk, fused) {  // keys per thread: 1, 2, 4 of 256 threads, then 2, 4 of 1024
  for (const int64_t n : {1, 31, 197, 256, 257, 577, 1025, 2049, 4096}) check_all({2, n, (n + 1) / 3});
  check_all({3, 40, 0});
  check_all({3, 40, 40});
  check_all({1, 900, 700, {}, 0, 0, 0, {96}});  // several blocks copy
}
TOKRED_TEST(prune_topk, select_then_copy) {  // in the registers of one block, then by chunks of a longer row
  for (const int64_t n : {4097, 8192, 8193, 16385}) check_all({1, n, 500});
}
TOKRED_TEST(prune_topk, packed) {
  check_all({4, 500, 60, {0, 20, 20, 400, 500}, 380, 10, 10});
  check_all({2, 500, 60, {-3, 200, 900}, 300});         // lengths that lie: nothing is read out of bounds
  check_all({2, 300, 4100, {0, 100, 300}, 200});        // more slots than the list in shared memory holds
  check_all({2, 40000, 50, {0, 39000, 40000}, 39000});  // chunks, of which the second row fills one
}
TOKRED_TEST(prune_topk, masks) {
  check_all({2, 333, 50, {}, 0, 50, 0});  // more forced than k
  check_all({2, 333, 50, {}, 0, 5, 0});
  check_all({2, 333, 200, {}, 0, 5, 90});  // fewer eligible than k
  check_all({2, 333, 50, {}, 0, 0, 100});
}
TOKRED_TEST(prune_topk, companions) {
  check_all({2, 130, 37, {}, 0, 0, 0, {1, 2, 4, 8, 24, 64}});
  check_all({2, 130, 37, {}, 0, 0, 0, {6, 48, 0, 128}, 2});
  check_all({1, 5000, 700, {}, 0, 0, 0, {1, 2, 4, 8, 96}, 0});
}
