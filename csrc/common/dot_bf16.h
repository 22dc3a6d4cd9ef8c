// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Dot products of bfloat16 queries with bfloat16 rows by the instruction that some CPUs have for them, for kernels
// whose queries are bfloat16 as they are. Twice the rate of dot_rows (common/dot_rows.h), which needs both as floats: a
// row then waits for memory, not for arithmetic. Products are exact, sums float32; subnormal numbers count as zeros.
#pragma once
#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

namespace tokred {

constexpr int64_t kDotBf16Step = 32;  // what a query's stride is a multiple of

bool has_dot_bf16();  // whether dot_rows_bf16 may be called

// As dot_rows, whose offsets, padding and fetch these are. q: [kRows, q_stride], zeros from dim on. kRows: 1 or 4.
template <int kRows>
void dot_rows_bf16(const c10::BFloat16* k, const int64_t* offset, int64_t begin, int64_t end, const c10::BFloat16* q,
                   int64_t q_stride, int64_t dim, bool fetch, float* score, int64_t score_stride);

}  // namespace tokred
