// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "compact/gather_tokens.h"

namespace tokred {
namespace {

template <bool kSpans>
void gather(const GatherTokensArgs& args) {
  for (int t = 0; t < args.num_tensors; ++t) {
    gather_rows(args.tensors[t], args.batch_size, args.k, [&](int64_t batch, int64_t head, int64_t slot) {
      return gather_source<kSpans>(args, t, batch, head, slot);
    });
  }
}

}  // namespace

void gather_tokens_cpu(const GatherTokensArgs& args) {
  if (args.keep_first + args.keep_last > 0) {
    gather<true>(args);
  } else {
    gather<false>(args);
  }
}

}  // namespace tokred
