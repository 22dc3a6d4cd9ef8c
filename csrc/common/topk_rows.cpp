// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "common/plan.h"
#include "common/topk.h"

namespace tokred {
namespace {

TOKRED_CLONES void write_list(const int32_t* list, int64_t count, int64_t length, int64_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = list[i];
  for (int64_t i = count; i < length; ++i) out[i] = -1;
}

template <typename T>
void select_rows(const TopkRows& args, int64_t begin, int64_t end) {
  const int64_t longest = args.max_seqlen, k = args.k;
  TopkScratch scratch(longest);
  AlignedBuffer<int32_t> kept((k < longest ? k : longest) + 32);
  for (int64_t r = begin; r < end; ++r) {
    const TopkRow<T> row = topk_row<T>(args, r);
    const int64_t count = topk_ascending(row, topk_count(args, r), kept.data(), scratch);
    if (args.rest_idx) {
      const int64_t rest = topk_rest(kept.data(), count, row.num_tokens, scratch);
      write_list(scratch.positions.data(), rest, args.num_rest, args.rest_idx + r * args.num_rest);
    }
    if (args.by_score) sort_by_score(row, kept.data(), count);
    write_list(kept.data(), count, k, args.kept_idx + r * k);
    if (args.num_kept) args.num_kept[r] = static_cast<int32_t>(count);
  }
}

}  // namespace

void topk_rows_cpu(const TopkRows& args) {
  // Selection costs about 1 ns per token: rows are grouped until a task is worth its start.
  const int64_t grain = 1 + 16384 / (args.max_seqlen + 64);
  parallel_for(args.num_rows, grain, [&](int64_t begin, int64_t end) {
    dispatch_float(args.dtype, [&](auto tag) { select_rows<typename decltype(tag)::type>(args, begin, end); });
  });
}

void plan_topk_rows(Plan& plan, const TopkPolicy& policy, int64_t num_rows) {
  if (policy.warps) {
    plan.launches.push_back(
        {"select_by_warp", {ceil_div<int64_t>(num_rows, kTopkWarpsPerBlock)}, kTopkWarpsPerBlock * 32});
  } else if (policy.num_chunks == 0) {
    plan.launches.push_back({"select", {num_rows}, policy.threads});
  } else {
    plan.launches.push_back({"pivot", {num_rows}, policy.threads});
    plan.launches.push_back({"chunk", {num_rows * policy.num_chunks}, kTopkChunkThreads});
    plan.launches.push_back({"merge", {num_rows}, policy.threads});
  }
}

}  // namespace tokred
