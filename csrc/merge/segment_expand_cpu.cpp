// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "merge/segment_expand.h"

namespace tokred {

void segment_expand_cpu(const SegmentExpandArgs& args) {
  const SegmentExpandSource source{args.dst_idx, args.num_tokens, args.num_out};
  gather_rows(args.rows, args.batch_size, args.num_tokens, source);
}

}  // namespace tokred
