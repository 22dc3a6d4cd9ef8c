// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/qk_rows.h"

namespace tokred {

void qk_score_cpu(const QkRows& rows);
int qk_score_cuda(const QkRows& rows, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
