// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/run_markers.h"

#include "common/parallel.h"

namespace tokred {
namespace {

constexpr int64_t kPiece = 1 << 16;  // tokens

// As if all tokens were one sequence, of which these are not the last.
TOKRED_CLONES void mark(const uint8_t* keep, uint8_t* kept_or_marker, uint8_t* marker, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t ends = static_cast<uint8_t>((keep[i] == 0) & (keep[i + 1] != 0));
    marker[i] = ends;
    kept_or_marker[i] = keep[i] | ends;
  }
}
TOKRED_CLONES int32_t count(const uint8_t* marker, int64_t n) {
  int32_t runs = 0;
  for (int64_t i = 0; i < n; ++i) runs += marker[i];
  return runs;
}

}  // namespace

void run_markers_cpu(const RunMarkersArgs& args) {
  const int64_t total = args.total_tokens;
  const auto end_at = [&](int64_t token) {
    args.marker[token] = args.keep[token] == 0;
    args.kept_or_marker[token] = 1;  // kept, or the end of the last run
  };
  if (total > 0) end_at(total - 1);
  parallel_for(total - 1, kPiece, [&](int64_t i, int64_t last) {
    mark(args.keep + i, args.kept_or_marker + i, args.marker + i, last - i);
  });
  for (int64_t b = 0; b < args.batch_size; ++b) {
    const TokenSpan span = marker_span(args, b);
    if (span.len > 0) end_at(span.begin + span.len - 1);
  }
  parallel_for(args.batch_size, 1 + kPiece * args.batch_size / (total + 1), [&](int64_t b, int64_t last) {
    for (; b < last; ++b) {
      const TokenSpan span = marker_span(args, b);
      args.num_runs[b] = count(args.marker + span.begin, span.len);
    }
  });
}

}  // namespace tokred
