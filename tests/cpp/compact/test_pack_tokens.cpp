// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/pack_tokens.h"

#include <memory>

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

struct Rows {
  int64_t row_bytes;
  int64_t gap = 0;   // bytes between the batches of a dense tensor
  int64_t lead = 0;  // bytes before the first row
};
struct Case {
  int64_t batch_size, num_tokens;  // packed: num_tokens of all sequences
  int percent;                     // of the tokens are kept
  int64_t max_total;
  std::vector<int32_t> cu_seqlens = {};
};

Results call(const Case& c, const std::vector<Rows>& rows, const Side& side) {
  Random random(static_cast<uint64_t>(c.num_tokens));
  const bool packed = !c.cu_seqlens.empty();
  const int64_t total = packed ? c.num_tokens : c.batch_size * c.num_tokens, batches = packed ? 1 : c.batch_size;
  std::vector<uint8_t> bits = random.whole<uint8_t>(total, 0, 100);
  for (uint8_t& bit : bits) bit = bit < c.percent;
  const Buffer<uint8_t> mask(side, bits);
  const Buffer<int32_t> cu_seqlens(side, c.cu_seqlens), cu_seqlens_kept(side, c.batch_size + 1);
  const Buffer<int32_t> num_kept(side, c.batch_size), counts(side, pack_chunks(total).count);
  const Buffer<int64_t> kept_rows(side, c.max_total);
  PackTokensArgs args{};
  args.mask = mask.data();
  args.cu_seqlens = packed ? cu_seqlens.data() : nullptr;
  args.batch_size = c.batch_size;
  args.num_tokens = packed ? 0 : c.num_tokens;
  args.total_tokens = total;
  args.max_total = c.max_total;
  args.kept_rows = kept_rows.data();
  args.cu_seqlens_kept = cu_seqlens_kept.data();
  args.num_kept = num_kept.data();
  args.chunk_counts = counts.data();
  std::vector<std::unique_ptr<Buffer<uint8_t>>> from, to;
  for (const Rows& r : rows) {
    const int64_t stride = (packed ? total : c.num_tokens) * r.row_bytes + r.gap;
    from.push_back(std::make_unique<Buffer<uint8_t>>(side, random.whole<uint8_t>(batches * stride, 0, 256), r.lead));
    to.push_back(std::make_unique<Buffer<uint8_t>>(side, c.max_total * r.row_bytes));
    PackTensor& t = args.tensors[args.num_tensors++];
    t.src = from.back()->bytes();
    t.dst = to.back()->bytes();
    t.row_bytes = t.src_token = r.row_bytes;
    t.src_batch = packed ? 0 : stride;
    t.rows_per_batch = r.gap ? static_cast<int32_t>(c.num_tokens) : 0;
  }
  TOKRED_RUN(side, pack_tokens, args);
  Results results;
  results.add("kept_rows", kept_rows).add("cu_seqlens_kept", cu_seqlens_kept).add("num_kept", num_kept);
  for (size_t i = 0; i < to.size(); ++i) results.add(text("tensor ", i).c_str(), *to[i]);
  return results;
}

void check_all(const Case& c, const std::vector<Rows>& rows) {
  check(text(c.batch_size, " x ", c.num_tokens, ", ", c.percent, "%, room for ", c.max_total),
        [&](const Side& side) { return call(c, rows, side); });
}

}  // namespace

TOKRED_TEST(pack_tokens, one_tile) {  // every copy width, room for more and for less than is kept
  check_all({2, 50, 40, 60}, {{1}, {2}, {4}, {8}, {16}, {4096}, {6}, {24}, {33}});
  check_all({2, 50, 40, 20}, {{8}, {24}});
  check_all({2, 50, 0, 20}, {{8}});
  check_all({2, 50, 100, 100}, {{8}});
  check_all({1, 4096, 50, 4096}, {{8}});
}
TOKRED_TEST(pack_tokens, several_tiles) {
  check_all({1, 4097, 50, 4097}, {{8}});
  check_all({3, 9001, 30, 9000}, {{2}, {16}});
  check_all({2, 70000, 3, 3000}, {{1}});  // several pieces of the CPU's threads
}
TOKRED_TEST(pack_tokens, packed) {
  check_all({4, 500, 50, 500, {0, 20, 20, 400, 500}}, {{8}, {24}});
  check_all({2, 500, 50, 300, {-3, 700, 200}}, {{8}});  // offsets that lie: nothing is read out of bounds
  check_all({3, 9000, 50, 9000, {0, 4096, 8192, 9000}}, {{8}});
}
TOKRED_TEST(pack_tokens, off_alignment_and_gaps) {
  check_all({2, 30, 50, 40}, {{32, 0, 1}, {32, 0, 8}, {32, 64}, {32, 8}, {2, 2}});
}
TOKRED_TEST(pack_tokens, empty) {
  check_all({2, 50, 50, 0}, {{8}});
  check_all({0, 50, 50, 0}, {{8}});
  check_all({2, 0, 50, 0}, {{8}});
  check_all({2, 50, 50, 60}, {{0}, {8}});
  check_all({2, 50, 50, 60}, {});
}
TOKRED_TEST(pack_tokens, sixteen_tensors) { check_all({1, 12, 50, 12}, std::vector<Rows>(kPackMaxTensors, Rows{12})); }
