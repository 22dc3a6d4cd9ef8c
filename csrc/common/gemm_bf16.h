// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Products of bfloat16 matrices with float32 results, which ATen's do not have, on CPUs with AVX-512's bfloat16
// instruction: twice the rate of float32. It multiplies exactly and adds in float32; of subnormal numbers it makes
// zeros. An element's bits depend on its two rows alone.
#pragma once
#include <cstdint>

#include "common/dispatch.h"

namespace tokred {

bool has_gemm_bf16();

// rows x depth of src (any row stride, last dim contiguous); rows up to padded_rows and columns up to padded_depth are
// zeros.
void pack_rows_bf16(const c10::BFloat16* src, int64_t stride_row, int64_t rows, int64_t depth, int64_t padded_rows,
                    int64_t padded_depth, c10::BFloat16* dst);

// c[m, n] = a[m, depth] * b[n, depth]^T; a and c contiguous and 64-byte aligned, rows of b at stride_b, an even number,
// and 4-byte aligned; m a multiple of 8, n and depth of 16, depth at most 256.
void gemm_nt_bf16(const c10::BFloat16* a, const c10::BFloat16* b, int64_t stride_b, float* c, int64_t m, int64_t n,
                  int64_t depth);

}  // namespace tokred
