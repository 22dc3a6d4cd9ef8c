// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"

namespace tokred {

struct ListUnionArgs {
  IndexPtr kept_idx;   // [num_unions, members]: the lists of a group lie one after the other
  int64_t* union_idx;  // [num_unions, size], ascending, then -1
  int32_t* num_union;  // [num_unions]
  int64_t num_unions, members, size;
  int64_t kv_len;  // positions are in [0, kv_len)
};

// A set of positions is a bit each. A block looks at so many at a time: 32 KiB of shared memory.
constexpr int kListUnionThreads = 512, kListUnionWords = 8192, kListUnionSpan = 32 * kListUnionWords;

void list_union_cpu(const ListUnionArgs& args);
int list_union_cuda(const ListUnionArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
