// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/gather_tokens.h"

#include <memory>

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Source {
  int64_t num_heads, num_tokens, row_bytes;
  int64_t lead = 0;  // bytes before the first row
};

struct Spans {
  int64_t first = 0, last = 0;
};

// Index is the dtype of the list, list_heads 1 or that of every tensor.
template <typename Index>
Results call(int64_t batch_size, int64_t list_heads, int64_t listed, const std::vector<Source>& sources,
             const Spans& spans, const Side& side) {
  const int64_t k = spans.first + listed + spans.last;
  Random random(static_cast<uint64_t>(k));
  const Buffer<Index> kept_idx(side,
                               random.whole<Index>(batch_size * list_heads * listed, -2, sources[0].num_tokens + 3));
  GatherTokensArgs args{};
  args.kept_idx = {kept_idx.data(), sizeof(Index) == 8};
  args.list_heads = list_heads;
  args.batch_size = batch_size;
  args.k = k;
  args.list_len = listed;
  args.keep_first = spans.first;
  args.keep_last = spans.last;
  std::vector<std::unique_ptr<Buffer<uint8_t>>> from, to;
  for (const Source& s : sources) {
    const int64_t rows = batch_size * s.num_heads * s.num_tokens;
    from.push_back(std::make_unique<Buffer<uint8_t>>(side, random.whole<uint8_t>(rows * s.row_bytes, 0, 256), s.lead));
    to.push_back(std::make_unique<Buffer<uint8_t>>(side, batch_size * s.num_heads * k * s.row_bytes));
    RowTensor& t = args.tensors[args.num_tensors];
    t.src = from.back()->bytes();
    t.dst = to.back()->bytes();
    t.row_bytes = s.row_bytes;
    t.num_heads = s.num_heads;
    t.src_batch = s.num_heads * s.num_tokens * s.row_bytes;
    t.src_head = s.num_tokens * s.row_bytes;
    t.src_token = s.row_bytes;
    args.num_tokens[args.num_tensors++] = s.num_tokens;
  }
  TOKRED_RUN(side, gather_tokens, args);
  Results results;
  for (size_t i = 0; i < to.size(); ++i) results.add(text("tensor ", i).c_str(), *to[i]);
  return results;
}

void check_both(int64_t batch_size, int64_t list_heads, int64_t k, const std::vector<Source>& sources,
                const Spans& spans = {}) {
  const std::string what = text("batch ", batch_size, ", ", list_heads, " lists of ", k);
  check(what + ", int32",
        [&](const Side& side) { return call<int32_t>(batch_size, list_heads, k, sources, spans, side); });
  check(what + ", int64",
        [&](const Side& side) { return call<int64_t>(batch_size, list_heads, k, sources, spans, side); });
}

}  // namespace

TOKRED_TEST(gather_tokens, shared_list) {  // every copy width, rows shorter and longer than a block's chunk
  check_both(2, 1, 37, {{1, 50, 1}, {1, 50, 2}, {1, 50, 4}, {1, 50, 8}, {1, 50, 16}, {1, 50, 4096}});
  check_both(2, 1, 37, {{1, 50, 6}, {1, 50, 20}, {1, 50, 24}, {1, 50, 33}, {1, 50, 48}});
  check_both(3, 1, 700, {{1, 50, 1}, {4, 50, 24}});
}
TOKRED_TEST(gather_tokens, off_alignment) {
  check_both(2, 1, 19, {{1, 30, 32, 1}, {1, 30, 32, 2}, {1, 30, 32, 4}, {1, 30, 32, 8}});
}
TOKRED_TEST(gather_tokens, list_per_head) { check_both(2, 3, 21, {{3, 40, 16}, {3, 40, 64}, {3, 25, 2}}); }
TOKRED_TEST(gather_tokens, spans) {
  check_both(2, 1, 21, {{1, 40, 16}, {3, 30, 24}, {1, 40, 1}}, {5, 3});
  check_both(2, 3, 21, {{3, 40, 16}, {3, 40, 66}}, {0, 40});
  check_both(2, 1, 0, {{1, 40, 16}}, {40, 0});
}
TOKRED_TEST(gather_tokens, empty) {
  check_both(2, 1, 0, {{1, 40, 16}});
  check_both(0, 1, 4, {{1, 40, 16}});
  check_both(2, 1, 5, {{1, 40, 0}, {0, 40, 16}, {1, 40, 8}});
  check_both(2, 1, 5, {{1, 0, 16}});
}
TOKRED_TEST(gather_tokens, sixteen_tensors) {
  check_both(1, 1, 9, std::vector<Source>(kGatherMaxTensors, Source{1, 12, 12}));
}
