// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Tensor-core products and the loads that feed them (sm_80 and up), as named functions: PTX under nvcc, twins that
// follow the same layouts under the emulator. Every function is called by all 32 lanes of a warp, converged.
//
// Fragment layouts (PTX ISA, "Matrix fragments for mma"), with g = lane / 4 and t = lane % 4. Two 16-bit values share a
// register, the lower index in the low half.
//
//   m16n8k16, half and bf16:    A [16 x 16]                 B [16 x 8]               C, D [16 x 8]
//                         a[0]  row g,     k 2t, 2t+1       b[0]  k 2t, 2t+1, n g    acc[0]  row g,     n 2t
//                         a[1]  row g + 8, k 2t, 2t+1       b[1]  k 2t+8, 2t+9, n g  acc[1]  row g,     n 2t + 1
//                         a[2]  row g,     k 2t+8, 2t+9                              acc[2]  row g + 8, n 2t
//                         a[3]  row g + 8, k 2t+8, 2t+9                              acc[3]  row g + 8, n 2t + 1
//
//   m16n8k8, tf32:        a[0]  row g,     k t              b[0]  k t,     n g       as above
//                         a[1]  row g + 8, k t              b[1]  k t + 4, n g
//                         a[2]  row g,     k t + 4
//                         a[3]  row g + 8, k t + 4
//
//   ldmatrix: matrices of 8 rows of 8 16-bit values (16 bytes). Lane 8 i + r gives the address of row r of matrix i,
//   and receives in out[i] the values (row g, columns 2t, 2t+1) of matrix i; with trans (rows 2t, 2t+1, column g). x2
//   takes the addresses of lanes 0 to 15 only (the others' are ignored, but must be given).
//     A from a row-major [16 x 16] tile:            ldmatrix_x4        row lane % 16, column 8 * (lane / 16)
//     B from [n][k] rows (keys times head_dim):     ldmatrix_x2        row n = lane % 8, column k = 8 * (lane / 8 % 2)
//     two B, n 0..7 and 8..15, from [n][k] rows:    ldmatrix_x4        row n = lane % 8 + 8 * (lane / 16), k as above;
//                                                                      out[0..1] is the first B, out[2..3] the second
//     B from [k][n] rows (values times head_dim):   ldmatrix_x2_trans  row k = lane % 16, column n
//     two B, n 0..7 and 8..15, from [k][n] rows:    ldmatrix_x4_trans  row k = lane % 16, column n = 8 * (lane / 16)
//
// Accumulators of one m16n8k16 are the A fragment of the next, two at a time: a[0] = pack(c0, c1), a[1] = pack(c2, c3)
// of the n-tile at k 0..7, a[2], a[3] of the n-tile at k 8..15.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "common/warp.cuh"

namespace tokred {

// acc += A B, in float32. T is c10::Half or c10::BFloat16 (the type of A and B).
template <typename T>
__device__ inline void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>, "float32 takes mma_m16n8k8_3xtf32");
#ifdef TOKRED_SIMT
  simt::mma_m16n8k16<T>(acc, a, b);
#else
  if constexpr (std::is_same_v<T, c10::Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// acc += A B with operands as to_tf32 makes them. One product of 10-bit fractions: not float32 accuracy.
__device__ inline void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef TOKRED_SIMT
  simt::mma_m16n8k8_tf32(acc, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The nearest value with a 10-bit fraction, ties away from zero, as float32 bits.
__device__ inline uint32_t to_tf32(float value) {
#ifdef TOKRED_SIMT
  return simt::to_tf32(value);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

// value = big + small up to 2^-22 of it: two tf32 numbers carry 21 of float32's 23 fraction bits.
struct Tf32Pair {
  uint32_t big, small;
};
__device__ inline Tf32Pair split_tf32(float value) {
  Tf32Pair pair;
  pair.big = to_tf32(value);
  pair.small = to_tf32(value - __uint_as_float(pair.big));
  return pair;
}

// acc += A B to float32 accuracy by three tf32 products; small * small is below float32's last bit and left out. The
// small terms go first, where they are not yet rounded away. Fragments as m16n8k8, whole floats. Inputs are finite and
// below 3.4e38: an infinity gives NaN.
__device__ inline void mma_m16n8k8_3xtf32(float (&acc)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t a_big[4], a_small[4], b_big[2], b_small[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Tf32Pair pair = split_tf32(a[i]);
    a_big[i] = pair.big;
    a_small[i] = pair.small;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Tf32Pair pair = split_tf32(b[i]);
    b_big[i] = pair.big;
    b_small[i] = pair.small;
  }
  mma_m16n8k8_tf32(acc, a_small, b_big);
  mma_m16n8k8_tf32(acc, a_big, b_small);
  mma_m16n8k8_tf32(acc, a_big, b_big);
}

// Two floats as the two halves of a register, rounded to nearest even; first goes to the low half (the lower index).
template <typename T>
__device__ inline uint32_t pack_pair(float first, float second) {
  Pack<T, 2> pair;
  pair.v[0] = T(first);
  pair.v[1] = T(second);
  return detail::bits_as<uint32_t>(pair);
}

namespace detail {
template <int kMatrices, bool kTrans>
__device__ inline void ldmatrix(uint32_t (&out)[kMatrices], const void* row) {
#ifdef TOKRED_SIMT
  simt::ldmatrix(out, kMatrices, kTrans, row);
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kMatrices == 4 && !kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  } else if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  } else if constexpr (!kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(from)
                 : "memory");
  }
#endif
}
}  // namespace detail

// row is a 16-byte aligned address in shared memory. No ordering: lanes that read what others wrote need a barrier.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) { detail::ldmatrix<4, false>(out, row); }
__device__ inline void ldmatrix_x2(uint32_t (&out)[2], const void* row) { detail::ldmatrix<2, false>(out, row); }
__device__ inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) { detail::ldmatrix<4, true>(out, row); }
__device__ inline void ldmatrix_x2_trans(uint32_t (&out)[2], const void* row) { detail::ldmatrix<2, true>(out, row); }

// 2^x and log2(x) by one instruction, relative error about 2^-22 (2^x) and absolute 2^-22 near 1 (log2). Subnormals
// count as zero. 2^-inf is 0, log2(0) is -inf.
__device__ inline float fast_exp2(float x) {
#ifdef TOKRED_SIMT
  return simt::exp2_ftz(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ inline float fast_log2(float x) {
#ifdef TOKRED_SIMT
  return simt::log2_ftz(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace tokred
