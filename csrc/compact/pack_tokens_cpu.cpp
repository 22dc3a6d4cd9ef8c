// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/pack_tokens.h"

#include <algorithm>
#include <vector>

namespace tokred {
namespace {

constexpr int64_t kChunk = 1 << 15;  // tokens

TOKRED_CLONES int64_t count_kept(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
  return count;
}

void find_rows(const PackTokensArgs& args) {
  const int64_t total = args.total_tokens, chunks = ceil_div(total, kChunk);
  std::vector<int64_t> before(static_cast<size_t>(chunks) + 1);  // kept tokens ahead of each chunk
  const auto chunk_len = [&](int64_t chunk) { return std::min(kChunk, total - chunk * kChunk); };
  parallel_for(chunks, 8, [&](int64_t chunk, int64_t last) {
    for (; chunk < last; ++chunk) {
      before[static_cast<size_t>(chunk) + 1] = count_kept(args.mask + chunk * kChunk, chunk_len(chunk));
    }
  });
  for (size_t chunk = 1; chunk < before.size(); ++chunk) before[chunk] += before[chunk - 1];
  parallel_for(chunks, 1, [&](int64_t chunk, int64_t last) {
    for (; chunk < last; ++chunk) {
      // No branch on the mask: what does not count is overwritten by the next, and the chunk's last kept token ends it.
      int64_t slot = before[static_cast<size_t>(chunk)], row = chunk * kChunk;
      const int64_t end = std::min(before[static_cast<size_t>(chunk) + 1], args.max_total);
      for (; slot < end; ++row) {
        args.kept_rows[slot] = row;
        slot += args.mask[row] != 0;
      }
    }
  });
  std::fill(args.kept_rows + std::min(before.back(), args.max_total), args.kept_rows + args.max_total, -1);
  const auto kept_before = [&](int64_t row) {
    const int64_t chunk = row / kChunk;
    return before[static_cast<size_t>(chunk)] + count_kept(args.mask + chunk * kChunk, row % kChunk);
  };
  args.cu_seqlens_kept[0] = 0;
  for (int64_t b = 0; b < args.batch_size; ++b) {
    const int64_t start = kept_before(pack_start(args, b)), end = kept_before(pack_start(args, b + 1));
    args.cu_seqlens_kept[b + 1] = static_cast<int32_t>(std::min(end, args.max_total));
    args.num_kept[b] = static_cast<int32_t>(std::max(end - start, int64_t{0}));
  }
}

}  // namespace

void pack_tokens_cpu(const PackTokensArgs& args) {
  if (!args.rows_known) find_rows(args);
  for (int i = 0; i < args.num_tensors; ++i) {
    const PackTensor& t = args.tensors[i];
    copy_rows(t, 1, args.max_total, [&](int64_t, int64_t) {
      return [&](int64_t slot) -> const char* { return pack_source(t, args.kept_rows[slot]); };
    });
  }
}

}  // namespace tokred
