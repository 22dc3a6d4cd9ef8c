// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/scatter_tokens.h"

#include <memory>

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Rows {
  int64_t num_heads, count;  // values in a row
  bool based = true;
  int64_t lead = 0;  // values before the first row and that of the base
};
struct Lists {
  int64_t batch_size, heads, k, num_tokens;
};
struct Blend {
  bool on;
  float alpha, beta;
};

// Index is the dtype of the lists, T that of all rows.
template <typename Index, typename T>
Results call(const Lists& lists, const std::vector<Rows>& rows, const Blend& blend, DType dtype, const Side& side) {
  Random random(static_cast<uint64_t>(lists.k));
  const int64_t all = lists.batch_size * lists.heads;
  const Buffer<Index> kept_idx(side, random.whole<Index>(all * lists.k, -2, lists.num_tokens + 3));
  const Buffer<int32_t> slot_idx(side, all * lists.num_tokens);
  ScatterTokensArgs args{};
  args.kept_idx = {kept_idx.data(), sizeof(Index) == 8};
  args.slot_idx = slot_idx.data();
  args.list_heads = lists.heads;
  args.batch_size = lists.batch_size;
  args.k = lists.k;
  args.num_tokens = lists.num_tokens;
  args.blend = blend.on;
  args.alpha = blend.alpha;
  args.beta = blend.beta;
  std::vector<std::unique_ptr<Buffer<T>>> kept, base, out;
  for (const Rows& r : rows) {
    const int64_t slots = lists.batch_size * r.num_heads * lists.k, bytes = r.count * int64_t{sizeof(T)};
    const int64_t tokens = lists.batch_size * r.num_heads * lists.num_tokens;
    kept.push_back(std::make_unique<Buffer<T>>(side, random.whole<T>(slots * r.count, -50, 50), r.lead));
    base.push_back(std::make_unique<Buffer<T>>(side, random.whole<T>(tokens * r.count, -50, 50), r.lead));
    out.push_back(std::make_unique<Buffer<T>>(side, tokens * r.count));
    ScatterTensor& t = args.tensors[args.num_tensors++];
    t.src = kept.back()->bytes();
    t.dst = out.back()->bytes();
    t.row_bytes = t.src_token = t.base_token = bytes;
    t.num_heads = r.num_heads;
    t.src_head = lists.k * bytes;
    t.src_batch = r.num_heads * lists.k * bytes;
    t.base = r.based ? base.back()->bytes() : nullptr;
    t.base_head = lists.num_tokens * bytes;
    t.base_batch = r.num_heads * lists.num_tokens * bytes;
    t.dtype = dtype;
  }
  TOKRED_RUN(side, scatter_tokens, args);
  Results results;
  results.add("slot_idx", slot_idx);
  for (size_t i = 0; i < out.size(); ++i) results.add(text("tensor ", i).c_str(), *out[i]);
  return results;
}

void check_all(const Lists& lists, const std::vector<Rows>& rows) {
  const std::string what =
      text("batch ", lists.batch_size, ", ", lists.heads, " lists of ", lists.k, " in ", lists.num_tokens);
  const Blend none{false, 1, 0}, mix{true, 0.25f, 0.5f}, scale{true, 2, 0};
  check(what + ", int32", [&](const Side& side) { return call<int32_t, float>(lists, rows, none, {}, side); });
  check(what + ", bytes", [&](const Side& side) { return call<int64_t, uint8_t>(lists, rows, none, {}, side); });
  for (const DType dtype : kDTypes) {
    dispatch_float(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      check(what + ", mixed " + name_of(dtype),
            [&](const Side& side) { return call<int64_t, T>(lists, rows, mix, dtype, side); });
      check(what + ", scaled " + name_of(dtype),
            [&](const Side& side) { return call<int64_t, T>(lists, rows, scale, dtype, side); });
    });
  }
}

}  // namespace

TOKRED_TEST(scatter_tokens, shared_list) {  // every copy width, rows shorter and longer than a block's chunk
  check_all({2, 1, 37, 50}, {{1, 1}, {1, 2}, {1, 3}, {1, 4}, {1, 8}, {1, 20, false}, {1, 33}, {1, 600}});
  check_all({3, 1, 60, 700}, {{1, 1, false}, {4, 6}});
}
TOKRED_TEST(scatter_tokens, off_alignment) { check_all({2, 1, 19, 30}, {{1, 16, true, 1}, {1, 16, true, 2}}); }
TOKRED_TEST(scatter_tokens, list_per_head) { check_all({2, 3, 21, 40}, {{3, 4}, {3, 16, false}}); }
TOKRED_TEST(scatter_tokens, long_rows) {  // tokens for several blocks, more slots than tokens
  check_all({1, 2, 300, 8200}, {{2, 2}});
  check_all({1, 1, 900, 40}, {{1, 2}});
}
TOKRED_TEST(scatter_tokens, empty) {
  check_all({2, 1, 0, 40}, {{1, 16}});
  check_all({0, 1, 4, 40}, {{1, 16}});
  check_all({2, 1, 5, 40}, {{1, 0}, {0, 16}, {1, 8}});
  check_all({2, 1, 5, 0}, {{1, 16}});
  check_all({2, 1, 5, 40}, {});
}
TOKRED_TEST(scatter_tokens, sixteen_tensors) {
  check_all({1, 1, 9, 12}, std::vector<Rows>(kScatterMaxTensors, Rows{1, 3}));
}
