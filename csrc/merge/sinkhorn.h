// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once
#include "common/dispatch.h"

namespace tokred {

// Kernel k = exp((f + g - cost) / eps) and scalings u, v: the plan is u k v. Rounds multiply k by scalings, which costs
// no exponential; where a scaling leaves [1 / kSinkhornFar, kSinkhornFar] all are absorbed into f and g and k is made
// anew. So nothing that matters to the plan under- or overflows, however small eps is: an entry of k that is 0 stands
// for less than kSinkhornFar^2 * 2^-125 in the plan, 2^-45.
constexpr float kSinkhornFar = 0x1p40f;

struct SinkhornArgs {
  const void* cost;         // [batch_size, num_rows, num_cols], the last dimension contiguous
  const float* row_mass;    // [batch_size, num_rows]; null: 1 / the problem's rows
  const float* col_mass;    // [batch_size, num_cols]; null: 1 / the problem's columns
  const int32_t* row_lens;  // [batch_size]; null: num_rows
  const int32_t* col_lens;  // [batch_size]; null: num_cols
  float* plan;              // [batch_size, num_rows, num_cols]
  int32_t* num_rounds;      // [batch_size]
  float* workspace;         // CUDA: [batch_size, 2 * (num_rows + num_cols)]
  int64_t batch_size, num_rows, num_cols;
  int64_t stride_batch, stride_row;  // of cost, in elements
  float eps, tol;
  int32_t max_rounds;
  DType dtype;  // of cost

  TOKRED_HOST_DEVICE int64_t rows_of(int64_t batch_idx) const { return clamped(row_lens, batch_idx, num_rows); }
  TOKRED_HOST_DEVICE int64_t cols_of(int64_t batch_idx) const { return clamped(col_lens, batch_idx, num_cols); }
  TOKRED_HOST_DEVICE float exp2_scale() const { return 1.44269504088896341f / eps; }  // e^(x / eps) = 2^(x * this)

 private:
  TOKRED_HOST_DEVICE static int64_t clamped(const int32_t* lens, int64_t batch_idx, int64_t most) {
    if (!lens) return most;
    const int64_t len = lens[batch_idx];
    return len < 0 ? 0 : len > most ? most : len;
  }
};

// CUDA: one block per problem. Its rows of k stay in shared memory as far as it goes, the others in L2, in the plan.
constexpr int kSinkhornThreads = 1024;
constexpr int kSinkhornSharedBytes = 80 << 10;  // of k; with all else two blocks fill an SM, and sm_86 holds one

constexpr int64_t sinkhorn_shared_bytes(const SinkhornArgs& a) {
  return std::min<int64_t>(a.num_rows * a.num_cols * 4, kSinkhornSharedBytes);
}

void sinkhorn_cpu(const SinkhornArgs& args);
int sinkhorn_cuda(const SinkhornArgs& args, CUstream_st* stream);  // returns a cudaError_t

}  // namespace tokred
