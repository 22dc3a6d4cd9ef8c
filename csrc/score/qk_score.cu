// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: K read once; common/qk_rows.cu, which prune_attn shares.
#include "score/qk_score.h"

namespace tokred {

int qk_score_cuda(const QkRows& rows, CUstream_st* stream) { return qk_rows_cuda(rows, stream); }

}  // namespace tokred
