// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// A bit per position: set for each entry, then read in order. Nothing is sorted.
#include "common/parallel.h"
#include "select/list_union.h"

namespace tokred {

void list_union_cpu(const ListUnionArgs& args) {
  const int64_t words = ceil_div<int64_t>(args.kv_len, 64);
  parallel_for(args.num_unions, 1 + 8192 / (args.members + words + 1), [&](int64_t begin, int64_t end) {
    AlignedBuffer<uint64_t> bits(words);
    for (int64_t row = begin; row < end; ++row) {
      std::fill_n(bits.data(), words, uint64_t{0});
      for (int64_t i = row * args.members; i < (row + 1) * args.members; ++i) {
        const int64_t position = args.kept_idx[i];
        if (position >= 0 && position < args.kv_len) bits[position / 64] |= uint64_t{1} << (position % 64);
      }
      int64_t *out = args.union_idx + row * args.size, *const last = out + args.size;
      for (int64_t word = 0; word < words; ++word) {
        for (uint64_t left = bits[word]; left; left &= left - 1) *out++ = word * 64 + __builtin_ctzll(left);
      }
      args.num_union[row] = static_cast<int32_t>(args.size - (last - out));
      std::fill(out, last, int64_t{-1});
    }
  });
}

}  // namespace tokred
