// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "score/qk_score.h"

namespace tokred {

void qk_score_cpu(const QkRows& rows) { qk_rows_cpu(rows); }

}  // namespace tokred
