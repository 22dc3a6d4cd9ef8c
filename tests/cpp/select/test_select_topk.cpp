// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "select/select_topk.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Case {
  int64_t batch_size, num_heads, num_tokens, k;  // packed: num_tokens of all sequences
  std::vector<int32_t> cu_seqlens = {};
  int64_t max_seqlen = 0;
  int keep_percent = 0, drop_percent = 0;  // of the tokens are forced, excluded
  int64_t keep_first = 0, keep_last = 0;
  bool count_per_row = false;
  bool alone = false;  // kept_idx alone
};

template <typename T>
Results call(const Case& c, bool by_score, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens * 31 + c.k));
  const bool packed = !c.cu_seqlens.empty();
  const int64_t num_rows = c.batch_size * c.num_heads;
  const int64_t total = packed ? c.num_heads * c.num_tokens : num_rows * c.num_tokens;
  std::vector<T> scores = random.whole<T>(total, -40, 40);  // ties at the cut in most rows
  for (size_t i = 0; i < scores.size(); i += 97) scores[i] = static_cast<T>(i % 2 ? NAN : -0.f);
  const auto mask = [&](int percent) {
    std::vector<uint8_t> bits = random.whole<uint8_t>(total, 0, 100);
    for (uint8_t& bit : bits) bit = bit < percent;
    return bits;
  };
  const Buffer<T> score(side, scores);
  const Buffer<uint8_t> keep(side, mask(c.keep_percent)), drop(side, mask(c.drop_percent));
  const Buffer<int32_t> cu_seqlens(side, c.cu_seqlens), num_kept(side, num_rows);
  const Buffer<int64_t> row_k(side, random.whole<int64_t>(num_rows, -1, c.k + 3)), kept_idx(side, num_rows * c.k);

  TopkRows args{};
  args.score = score.data();
  args.keep_mask = c.keep_percent ? keep.data() : nullptr;
  args.drop_mask = c.drop_percent ? drop.data() : nullptr;
  args.cu_seqlens = packed ? cu_seqlens.data() : nullptr;
  if (c.count_per_row) args.row_k = {row_k.data(), true};
  args.kept_idx = kept_idx.data();
  args.num_rows = num_rows;
  args.num_heads = c.num_heads;
  args.num_tokens = c.num_tokens;
  args.max_seqlen = packed ? c.max_seqlen : c.num_tokens;
  args.k = c.k;
  args.num_rest = args.max_seqlen;
  args.keep_first = c.keep_first;
  args.keep_last = c.keep_last;
  args.score_stride = {packed ? 0 : c.num_heads * c.num_tokens, c.num_tokens};
  args.keep_stride = args.drop_stride = args.score_stride;
  args.dtype = dtype;
  args.by_score = by_score;
  const Buffer<int64_t> rest_idx(side, c.alone ? 0 : num_rows * args.num_rest);
  if (!c.alone) {
    args.num_kept = num_kept.data();
    args.rest_idx = rest_idx.data();
  }
  const Buffer<uint64_t> workspace(side, ceil_div<int64_t>(select_topk_workspace_words(choose_policy(args), args), 2));
  args.workspace = reinterpret_cast<uint32_t*>(workspace.data());

  TOKRED_RUN(side, select_topk, args);
  Results results;
  results.add("kept_idx", kept_idx);
  if (!c.alone) results.add("num_kept", num_kept).add("rest_idx", rest_idx);
  return results;
}

void check_all(const Case& c) {
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (const bool by_score : {false, true}) {
        if (c.alone && by_score) continue;
        check(text(name_of(dtype), " [", c.batch_size, ", ", c.num_heads, ", ", c.num_tokens, "] keep ", c.k,
                   by_score ? " by score" : " by index"),
              [&](const Side& side) { return call<T>(c, by_score, dtype, side); });
      }
    });
  }
}

}  // namespace

TOKRED_TEST(select_topk, warps) {  // 8, 16, 24, 32 keys per lane
  for (const int64_t n : {1, 31, 256, 257, 577, 800, 1024}) check_all({2, 3, n, std::min<int64_t>((n + 1) / 3, 256)});
  check_all({1, 2, 40, 0});
  check_all({1, 2, 40, 40});
  check_all({3, 1, 40, 7, {}, 0, 0, 0, 0, 0, false, true});
}
TOKRED_TEST(select_topk, blocks) {  // 2, 4, 8 keys per thread, and 256 threads where a warp cannot sort the list
  check_all({1, 2, 1000, 500});
  for (const int64_t n : {1025, 2049, 4097, 8192}) check_all({1, 2, n, 300});
}
TOKRED_TEST(select_topk, chunks) {  // few and many candidates, and rows whose pivot lets all pass
  check_all({1, 2, 8193, 20});
  check_all({1, 1, 20000, 3000});
  check_all({1, 1, 9000, 1000, {}, 0, 40, 0});  // more forced than k: they alone compete
  check_all({1, 1, 9000, 1000, {}, 0, 1, 95});  // fewer eligible than k: the row is read anew
}
TOKRED_TEST(select_topk, streamed) {  // more candidates than the workspace holds
  check_all({1, 1, 33000, 7000});
}
TOKRED_TEST(select_topk, long_lists) {  // sorted in runs, then merged in one and in two rounds
  check_all({1, 2, 8000, 4097});
  check_all({1, 1, 16000, 9000});
  check_all({1, 1, 8000, 5000, {}, 0, 0, 50});  // and -1 at the end
}
TOKRED_TEST(select_topk, windows_and_counts) {
  for (const int64_t n : {60, 1200, 9000}) {
    check_all({2, 2, n, 30, {}, 0, 3, 3, 4, 9});
    check_all({2, 2, n, 30, {}, 0, 3, 3, 40, 9});  // the windows alone are more than k
    check_all({2, 2, n, 30, {}, 0, 0, 10, 2, 2, true});
  }
}
TOKRED_TEST(select_topk, packed) {
  check_all({4, 2, 500, 60, {0, 20, 20, 400, 500}, 380, 10, 10, 1, 1});
  check_all({2, 2, 500, 60, {-3, 200, 900}, 300});               // lengths that lie: nothing is read out of bounds
  check_all({2, 1, 9300, 5000, {0, 300, 9300}, 9000, 0, 0, 2});  // more slots than the first row has tokens
}
TOKRED_TEST(select_topk, empty) {
  check_all({0, 2, 9, 3});
  check_all({2, 2, 0, 0});
}
