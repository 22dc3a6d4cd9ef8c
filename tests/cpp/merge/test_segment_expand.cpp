// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/segment_expand.h"

#include "harness.h"

using namespace tokred;
using namespace tokred::test;

namespace {

template <typename Index>
Results call(int64_t batch_size, int64_t num_tokens, int64_t num_out, int64_t row_bytes, int64_t lead,
             const Side& side) {
  Random random(static_cast<uint64_t>(num_tokens));
  const Buffer<uint8_t> y(side, random.whole<uint8_t>(batch_size * num_out * row_bytes, 0, 256), lead);
  const Buffer<uint8_t> out(side, batch_size * num_tokens * row_bytes);
  const Buffer<Index> dst_idx(side, random.whole<Index>(batch_size * num_tokens, -1, num_out + 1));
  SegmentExpandArgs args{};
  args.rows.src = y.bytes();
  args.rows.dst = out.bytes();
  args.rows.row_bytes = row_bytes;
  args.rows.src_batch = num_out * row_bytes;
  args.rows.src_token = row_bytes;
  args.dst_idx = {dst_idx.data(), sizeof(Index) == 8};
  args.batch_size = batch_size;
  args.num_tokens = num_tokens;
  args.num_out = num_out;
  TOKRED_RUN(side, segment_expand, args);
  return Results().add("tokens", out);
}

void check_both(int64_t batch_size, int64_t num_tokens, int64_t num_out, int64_t row_bytes, int64_t lead = 0) {
  const std::string what = text(batch_size, " x ", num_tokens, " of ", num_out, ", rows of ", row_bytes, " bytes");
  check(what + ", int32",
        [&](const Side& s) { return call<int32_t>(batch_size, num_tokens, num_out, row_bytes, lead, s); });
  check(what + ", int64",
        [&](const Side& s) { return call<int64_t>(batch_size, num_tokens, num_out, row_bytes, lead, s); });
}

}  // namespace

TOKRED_TEST(segment_expand, widths) {
  for (const int64_t row_bytes : {2, 4, 6, 8, 24, 64, 2048}) check_both(2, 61, 20, row_bytes);
  for (const int64_t lead : {1, 2, 4, 8}) check_both(2, 61, 20, 64, lead);
}
TOKRED_TEST(segment_expand, empty) {
  check_both(2, 0, 20, 16);
  check_both(0, 7, 20, 16);
  check_both(2, 7, 0, 16);
  check_both(2, 7, 20, 0);
}
