// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// One task per row selects; then every tensor's kept rows are copied, split evenly over the threads whatever the batch.
#include "common/topk.h"
#include "compact/prune_topk.h"

namespace tokred {

void prune_topk_cpu(const PruneTopkArgs& args) {
  const int64_t k = args.k;
  // Selection costs about 1 ns per token: rows are grouped until a task is worth its start.
  const int64_t grain = 1 + 16384 / (args.max_seqlen + 64);
  parallel_for(args.batch_size, grain, [&](int64_t begin, int64_t end) {
    TopkScratch scratch(args.max_seqlen);
    AlignedBuffer<int32_t> kept((k < args.max_seqlen ? k : args.max_seqlen) + 32);
    dispatch_float(args.score_dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t b = begin; b < end; ++b) {
        const auto [first, len] = prune_topk_row(args, b);
        const int64_t offset = args.cu_seqlens ? first : b * args.num_tokens;
        const TopkRow<T> row{static_cast<const T*>(args.score) + b * args.stride_score + first, 1,
                             args.keep_mask ? args.keep_mask + offset : nullptr,
                             args.drop_mask ? args.drop_mask + offset : nullptr, len};
        const int64_t count = topk_ascending(row, k, kept.data(), scratch);
        int64_t* out = args.kept_idx + b * k;
        for (int64_t i = 0; i < count; ++i) out[i] = kept[i];
        for (int64_t i = count; i < k; ++i) out[i] = -1;
        if (args.num_kept) args.num_kept[b] = static_cast<int32_t>(count);
      }
    });
  });
  for (int t = 0; t < args.num_tensors; ++t) {
    gather_rows(args.tensors[t], args.batch_size, k, [&](int64_t batch, int64_t, int64_t slot) {
      const int64_t token = args.kept_idx[batch * k + slot];
      return token < 0 ? token : token + prune_topk_row(args, batch).begin;
    });
  }
}

}  // namespace tokred
