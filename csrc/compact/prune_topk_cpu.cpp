// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per row selects; then every tensor's kept rows are copied, split evenly over the threads whatever the batch.
#include "common/topk.h"
#include "compact/prune_topk.h"

namespace tokred {

void prune_topk_cpu(const PruneTopkArgs& args) {
  topk_rows_cpu(args.rows);
  for (int t = 0; t < args.num_tensors; ++t) {
    gather_rows(args.tensors[t], args.rows.num_rows, args.rows.k, [&](int64_t batch, int64_t, int64_t slot) {
      const int64_t token = args.rows.kept_idx[batch * args.rows.k + slot];
      return token < 0 ? token : token + topk_span(args.rows, batch).begin;
    });
  }
}

}  // namespace tokred
