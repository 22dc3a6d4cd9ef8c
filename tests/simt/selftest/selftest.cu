// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Kernels that use csrc/common and the emulator rightly (ok_) and wrongly (bad_, race_): test_wrappers.py and
// test_simt.py say what each must give. The right ones also compile with nvcc, and run on a GPU where there is one.
#include <cstring>

#include "common/block.cuh"
#include "common/cp_async.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"

#ifdef TOKRED_SIMT
#define SELFTEST_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define SELFTEST_EXPORT extern "C"
#endif

namespace tokred {
namespace {

struct Case {
  const void* a = nullptr;
  const void* b = nullptr;
  void* out = nullptr;
  int n = 0;
  template <typename T>
  const T* in_a() const {
    return static_cast<const T*>(a);
  }
  template <typename T>
  const T* in_b() const {
    return static_cast<const T*>(b);
  }
  template <typename T>
  T* to() const {
    return static_cast<T*>(out);
  }
};
struct Entry {
  const char* name;
  int (*run)(const Case&);
  Entry* next;
};
Entry* entries = nullptr;
struct Register {
  Entry entry;
  Register(const char* name, int (*run)(const Case&)) : entry{name, run, entries} { entries = &entry; }
};
#define CASE(name)                             \
  int run_##name(const Case& c);               \
  Register register_##name(#name, run_##name); \
  int run_##name([[maybe_unused]] const Case& c)

// ---------------------------------------------------------------- right

// out[32 * row + lane], one row per function.
__global__ void ok_warp_functions(const int* in, int* out) {
  const int lane = lane_index();
  const int v = in[lane];
  int row = 0;
  const auto put = [&](int value) { out[32 * row++ + lane] = value; };
  put(__shfl_sync(kFullMask, v, 5));
  put(__shfl_sync(kFullMask, v, 11, 8));
  put(__shfl_up_sync(kFullMask, v, 3));
  put(__shfl_up_sync(kFullMask, v, 3, 16));
  put(__shfl_down_sync(kFullMask, v, 7));
  put(__shfl_down_sync(kFullMask, v, 2, 4));
  put(__shfl_xor_sync(kFullMask, v, 21));
  put(__shfl_xor_sync(kFullMask, v, 9, 8));
  put(static_cast<int>(__ballot_sync(kFullMask, v & 1)));
  put(__any_sync(kFullMask, v == in[7]) + 2 * __all_sync(kFullMask, v == in[7]));
  put(static_cast<int>(__match_any_sync(kFullMask, v % 4)));
  int pred = 0;
  put(static_cast<int>(__match_all_sync(kFullMask, 17, &pred)) + 2 * pred);
  put(static_cast<int>(__match_all_sync(kFullMask, lane / 16, &pred)) + 2 * pred);
  put(__reduce_add_sync(kFullMask, v));
  put(__reduce_min_sync(kFullMask, v));
  put(__reduce_max_sync(kFullMask, v));
  put(static_cast<int>(__reduce_xor_sync(kFullMask, static_cast<unsigned>(v))));
  put(warp_sum(v));
  put(warp_max<8>(v));
  put(static_cast<int>(warp_min(static_cast<int64_t>(v) << 33) >> 33));
  put(warp_inclusive_scan(v));
}
CASE(ok_warp_functions) { return launch(ok_warp_functions, 1, 32, 0, nullptr, c.in_a<int>(), c.to<int>()); }

// The two halves of a warp meet in calls of their own, one of them twice as often, then all meet.
__global__ void ok_two_masks(const int* in, int* out) {
  const int lane = lane_index();
  int sum = 0;
  if (lane < 16) {
    for (int i = 0; i < 4; ++i) sum += __shfl_xor_sync(0x0000ffffu, in[lane] + i, 1 << i);
  } else {
    for (int i = 0; i < 8; ++i) sum += __shfl_xor_sync(0xffff0000u, in[lane] + i, 1 << i % 4);
  }
  const unsigned odd = 0xaaaaaaaau;
  if (lane & 1) {
    sum += __reduce_max_sync(odd, in[lane]);
  } else {
    sum += __reduce_add_sync(~odd, in[lane]);
  }
  out[lane] = sum;
}
CASE(ok_two_masks) { return launch(ok_two_masks, 1, 32, 0, nullptr, c.in_a<int>(), c.to<int>()); }

struct ReduceStorage {
  BlockScratch scratch;
};
// Per block of c.n threads over a float row: sum, max, min, and an exclusive scan of its integer parts.
__global__ void ok_block_functions(const float* in, float* out, int* scan) {
  TOKRED_SHARED(ReduceStorage, shared);
  const int n = num_threads_in_block(), rank = thread_rank();
  const float v = in[static_cast<int>(blockIdx.x) * n + rank];
  const float sum = block_sum(v, shared.scratch), high = block_max(v, shared.scratch);
  const float low = block_min(v, shared.scratch);
  int total = 0;
  const int before = block_exclusive_scan(static_cast<int>(v), shared.scratch, &total);
  scan[static_cast<int>(blockIdx.x) * n + rank] = before;
  // Any thread may write: all have the results.
  if (rank == n - 1) {
    float* row = out + 4 * blockIdx.x;
    row[0] = sum;
    row[1] = high;
    row[2] = low;
    row[3] = static_cast<float>(total);
  }
}
CASE(ok_block_functions) {
  return launch(ok_block_functions, 3, dim3(32, static_cast<unsigned>(c.n / 32)), sizeof(ReduceStorage), nullptr,
                c.in_a<float>(), c.to<float>(), static_cast<int*>(const_cast<void*>(c.b)));
}

__global__ void ok_barrier_votes(const int* in, int* out) {
  const int v = in[threadIdx.x];
  int* row = out + 4 * threadIdx.x;
  row[0] = __syncthreads_or(v == 3);
  row[1] = __syncthreads_and(v == 3);
  row[2] = __syncthreads_count(v == 3);
  row[3] = __syncthreads_and(1);
}
CASE(ok_barrier_votes) { return launch(ok_barrier_votes, 1, 96, 0, nullptr, c.in_a<int>(), c.to<int>()); }

struct PairStorage {
  int value[64];
};
// Warps 0 and 1 produce, 2 and 3 consume, twice through the same buffer.
__global__ void ok_named_barriers(const int* in, int* out) {
  TOKRED_SHARED(PairStorage, shared);
  const int rank = thread_rank();
  constexpr int kFull = 1, kEmpty = 2;
  for (int round = 0; round < 2; ++round) {
    if (rank < 64) {
      if (round > 0) named_barrier_sync(kEmpty, 128);
      shared.value[rank] = in[rank] + round;
      named_barrier_arrive(kFull, 128);
    } else {
      named_barrier_sync(kFull, 128);
      out[64 * round + rank - 64] = shared.value[127 - rank];
      if (round == 0) named_barrier_arrive(kEmpty, 128);
    }
  }
}
CASE(ok_named_barriers) {
  return launch(ok_named_barriers, 1, 128, 0 + sizeof(PairStorage), nullptr, c.in_a<int>(), c.to<int>());
}

struct CountStorage {
  int count[4];
  unsigned highest;
  unsigned long long seen;
};
__global__ void ok_atomics(const int* in, int* out, int n) {
  TOKRED_SHARED(CountStorage, shared);
  const int rank = thread_rank();
  if (rank < 4) shared.count[rank] = 0;
  if (rank == 0) {
    shared.highest = 0;
    shared.seen = 0;
  }
  __syncthreads();
  for (int i = rank; i < n; i += num_threads_in_block()) {
    atomicAdd(&shared.count[in[i] & 3], 1);
    atomicMax(&shared.highest, static_cast<unsigned>(in[i]));
    atomicOr(&shared.seen, 1ull << (in[i] & 63));
    atomicMin(&out[6], in[i]);
  }
  __syncthreads();
  if (rank < 4) atomicAdd(&out[rank], shared.count[rank]);
  if (rank == 4) atomicMax(&out[4], static_cast<int>(shared.highest));
  if (rank == 5) atomicAdd(&out[5], __popcll(shared.seen));
}
CASE(ok_atomics) { return launch(ok_atomics, 5, 64, sizeof(CountStorage), nullptr, c.in_a<int>(), c.to<int>(), c.n); }

struct TicketStorage {
  BlockScratch scratch;
  int is_last;
};
// The block that takes the last ticket adds up what all blocks have left: fence, atomic, then read.
__global__ void ok_last_block(const float* in, float* partial, float* out, unsigned* ticket) {
  TOKRED_SHARED(TicketStorage, shared);
  const float sum = block_sum(in[blockIdx.x * blockDim.x + threadIdx.x], shared.scratch);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    shared.is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  const float all = block_sum(threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.f, shared.scratch);
  if (threadIdx.x == 0) *out = all;
}
CASE(ok_last_block) {
  auto* out = c.to<float>();  // [0] result, [1] ticket, [2..] partial sums
  return launch(ok_last_block, 7, 64, sizeof(TicketStorage), nullptr, c.in_a<float>(), out + 2, out,
                reinterpret_cast<unsigned*>(out + 1));
}

// One warp, one product. a: A [16 x k] and b: B [k x 8] row-major, out: [16 x 8], starting from C = out.
template <typename T>
__global__ void ok_mma(const T* a, const T* b, float* out) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const auto pair = [](T low, T high) { return pack_pair<T>(static_cast<float>(low), static_cast<float>(high)); };
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const T* p = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
    fa[i] = pair(p[0], p[1]);
  }
  for (int i = 0; i < 2; ++i) fb[i] = pair(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
  float* rows[2] = {out + g * 8 + 2 * t, out + (g + 8) * 8 + 2 * t};
  float acc[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  mma_m16n8k16<T>(acc, fa, fb);
  for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = acc[i];
}
CASE(ok_mma_half) {
  return launch(ok_mma<c10::Half>, 1, 32, 0, nullptr, c.in_a<c10::Half>(), c.in_b<c10::Half>(), c.to<float>());
}
CASE(ok_mma_bf16) {
  return launch(ok_mma<c10::BFloat16>, 1, 32, 0, nullptr, c.in_a<c10::BFloat16>(), c.in_b<c10::BFloat16>(),
                c.to<float>());
}
// mode 0: rounded to tf32; 1: raw bits, of which the hardware drops the low 13; 2: three products.
__global__ void ok_mma_tf32(const float* a, const float* b, float* out, int mode) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  float fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)];
  for (int i = 0; i < 2; ++i) fb[i] = b[(t + 4 * i) * 8 + g];
  float* rows[2] = {out + g * 8 + 2 * t, out + (g + 8) * 8 + 2 * t};
  float acc[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  if (mode == 2) {
    mma_m16n8k8_3xtf32(acc, fa, fb);
  } else {
    uint32_t ba[4], bb[2];
    for (int i = 0; i < 4; ++i) ba[i] = mode == 0 ? to_tf32(fa[i]) : __float_as_uint(fa[i]);
    for (int i = 0; i < 2; ++i) bb[i] = mode == 0 ? to_tf32(fb[i]) : __float_as_uint(fb[i]);
    mma_m16n8k8_tf32(acc, ba, bb);
  }
  for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = acc[i];
}
CASE(ok_mma_tf32) {
  return launch(ok_mma_tf32, 1, 32, 0, nullptr, c.in_a<float>(), c.in_b<float>(), c.to<float>(), c.n);
}

struct TileStorage {
  alignas(16) c10::Half a[16 * 16];
  alignas(16) c10::Half b[16 * 16];
};
// C [16 x 16] = A [16 x 16] times B, whose 16 columns are two n-tiles; out is [16 x 16] from C = out.
// mode 0, 1: b holds rows [n][k], by x2 or x4; mode 2, 3: b holds rows [k][n], by x2_trans or x4_trans.
__global__ void ok_ldmatrix(const c10::Half* a, const c10::Half* b, float* out, int mode) {
  TOKRED_SHARED(TileStorage, shared);
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) {
    shared.a[i] = a[i];
    shared.b[i] = b[i];
  }
  __syncwarp();
  uint32_t fa[4], fb[2][2];
  ldmatrix_x4(fa, shared.a + 16 * (lane % 16) + 8 * (lane / 16));
  if (mode == 0) {
    for (int j = 0; j < 2; ++j) ldmatrix_x2(fb[j], shared.b + 16 * (8 * j + lane % 8) + 8 * (lane / 8 % 2));
  } else if (mode == 2) {
    for (int j = 0; j < 2; ++j) ldmatrix_x2_trans(fb[j], shared.b + 16 * (lane % 16) + 8 * j);
  } else {
    uint32_t both[4];
    if (mode == 1) {
      ldmatrix_x4(both, shared.b + 16 * (lane % 8 + 8 * (lane / 16)) + 8 * (lane / 8 % 2));
    } else {
      ldmatrix_x4_trans(both, shared.b + 16 * (lane % 16) + 8 * (lane / 16));
    }
    for (int j = 0; j < 4; ++j) fb[j / 2][j % 2] = both[j];
  }
  for (int j = 0; j < 2; ++j) {
    float* rows[2] = {out + g * 16 + 8 * j + 2 * t, out + (g + 8) * 16 + 8 * j + 2 * t};
    float acc[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
    mma_m16n8k16<c10::Half>(acc, fa, fb[j]);
    for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = acc[i];
  }
}
CASE(ok_ldmatrix) {
  return launch(ok_ldmatrix, 1, 32, sizeof(TileStorage), nullptr, c.in_a<c10::Half>(), c.in_b<c10::Half>(),
                c.to<float>(), c.n);
}

// S = A B, then S B by the accumulators as the next A: the chain of attention.
__global__ void ok_mma_chain(const c10::Half* a, const c10::Half* b, float* out) {
  TOKRED_SHARED(TileStorage, shared);
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) {
    shared.a[i] = a[i];
    shared.b[i] = b[i];
  }
  __syncwarp();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, shared.a + 16 * (lane % 16) + 8 * (lane / 16));
  ldmatrix_x4_trans(fb, shared.b + 16 * (lane % 16) + 8 * (lane / 16));
  const uint32_t tiles[2][2] = {{fb[0], fb[1]}, {fb[2], fb[3]}};
  float s[2][4] = {};
  for (int j = 0; j < 2; ++j) mma_m16n8k16<c10::Half>(s[j], fa, tiles[j]);
  const uint32_t next[4] = {pack_pair<c10::Half>(s[0][0], s[0][1]), pack_pair<c10::Half>(s[0][2], s[0][3]),
                            pack_pair<c10::Half>(s[1][0], s[1][1]), pack_pair<c10::Half>(s[1][2], s[1][3])};
  for (int j = 0; j < 2; ++j) {
    float acc[4] = {};
    mma_m16n8k16<c10::Half>(acc, next, tiles[j]);
    for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 16 + 8 * j + 2 * t + i % 2] = acc[i];
  }
}
CASE(ok_mma_chain) {
  return launch(ok_mma_chain, 1, 32, sizeof(TileStorage), nullptr, c.in_a<c10::Half>(), c.in_b<c10::Half>(),
                c.to<float>());
}

// out = in, through a ring of kStages tiles of 64 threads x 4 floats; floats from index valid on become zero.
constexpr int kStages = 3;
struct RingStorage {
  alignas(16) float tile[kStages][256];
};
__device__ inline void copy_tile(float* tile, const float* in, int tile_idx, int num_tiles, int valid) {
  if (tile_idx < num_tiles) {
    const int rank = thread_rank(), first = 256 * tile_idx + 4 * rank;
    float* to = tile + 4 * rank;
    if (rank < 32) {
      cp_async_16(to, in + first, first + 4 <= valid);
    } else if (rank < 48) {
      for (int i = 0; i < 4; i += 2) cp_async_8(to + i, in + first + i, first + i + 2 <= valid);
    } else {
      for (int i = 0; i < 4; ++i) cp_async_4(to + i, in + first + i, first + i < valid);
    }
  }
  cp_async_commit();
}
// bug 0: none; 1: waits for one group too few; 2: no barrier after the wait; 3: never waits.
__global__ void async_ring(const float* in, float* out, int num_tiles, int valid, int bug) {
  TOKRED_SHARED(RingStorage, shared);
  for (int i = 0; i < kStages - 1; ++i) copy_tile(shared.tile[i], in, i, num_tiles, valid);
  for (int i = 0; i < num_tiles; ++i) {
    if (bug == 1) {
      cp_async_wait<kStages - 1>();
    } else if (bug != 3) {
      cp_async_wait<kStages - 2>();
    }
    if (bug != 2) __syncthreads();
    copy_tile(shared.tile[(i + kStages - 1) % kStages], in, i + kStages - 1, num_tiles, valid);
    for (int j = 0; j < 4; ++j) {  // another thread's data
      const int at = (4 * thread_rank() + 64 + j) % 256;
      out[256 * i + at] = shared.tile[i % kStages][at];
    }
  }
}
int run_ring(const Case& c, int bug) {
  return launch(async_ring, 1, 64, sizeof(RingStorage), nullptr, c.in_a<float>(), c.to<float>(), 5, c.n, bug);
}
CASE(ok_async_ring) { return run_ring(c, 0); }

struct HeadStorage {
  int count;
  unsigned char odd[3];
};
// A struct and a tail of c.n floats: the tail is reversed.
__global__ void ok_tail(const float* in, float* out, int n) {
  TOKRED_SHARED(HeadStorage, head);
  TOKRED_SHARED_TAIL(HeadStorage, bytes);
  auto* tail = reinterpret_cast<float*>(bytes);
  if (threadIdx.x == 0) head.count = n;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) tail[i] = in[i];
  __syncwarp();
  for (int i = static_cast<int>(threadIdx.x); i < head.count; i += 32) out[i] = tail[n - 1 - i];
}
CASE(ok_tail) {
  return launch(ok_tail, 1, 32, shared_bytes_with_tail<HeadStorage>(static_cast<size_t>(c.n) * sizeof(float)), nullptr,
                c.in_a<float>(), c.to<float>(), c.n);
}

CASE(ok_empty_grid) { return launch(ok_tail, dim3(0, 5), 32, 0, nullptr, c.in_a<float>(), c.to<float>(), 1); }

// out: [block][thread] = linear index, from every index variable.
__global__ void ok_indices(int* out) {
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  out[block * num_threads_in_block() + thread_rank()] =
      static_cast<int>(1000000 * blockIdx.z + 100000 * blockIdx.y + 10000 * blockIdx.x + 1000 * threadIdx.z +
                       100 * threadIdx.y + threadIdx.x);
}
CASE(ok_indices) { return launch(ok_indices, dim3(3, 2, 2), dim3(4, 4, 2), 0, nullptr, c.to<int>()); }

template <typename T, int kVec>
__global__ void ok_packs(const T* in, T* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * kVec;
  if (i >= n) return;
  auto pack = i % 2 ? load_pack_once<kVec>(in + i) : load_pack<kVec>(in + i);
  for (int j = 0; j < kVec; ++j) pack.v[j] = T(float(pack.v[j]) + 1.f);
  i % 3 ? store_pack_once(out + i, pack) : store_pack(out + i, pack);
}
CASE(ok_packs_half) {
  return launch(ok_packs<c10::Half, 8>, 2, 32, 0, nullptr, c.in_a<c10::Half>(), c.to<c10::Half>(), c.n);
}
CASE(ok_packs_float) { return launch(ok_packs<float, 2>, 5, 64, 0, nullptr, c.in_a<float>(), c.to<float>(), c.n); }

__global__ void ok_math(const float* in, float* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    out[i] = fast_exp2(in[i]);
    out[n + i] = fast_log2(in[i]);
    out[2 * n + i] = __uint_as_float(to_tf32(in[i]));
    const Tf32Pair pair = split_tf32(in[i]);
    out[3 * n + i] = __uint_as_float(pair.big) + __uint_as_float(pair.small);
  }
}
CASE(ok_math) { return launch(ok_math, 1, 32, 0, nullptr, c.in_a<float>(), c.to<float>(), c.n); }

#ifdef TOKRED_SIMT
// ---------------------------------------------------------------- wrong

struct IntStorage {
  int v[128];
};
#define BAD(name, num_threads, ...)                                                                            \
  __global__ void name(const int* in, int* out) {                                                              \
    TOKRED_SHARED(IntStorage, shared);                                                                         \
    const int lane = lane_index(), rank = thread_rank();                                                       \
    (void)lane, (void)rank, (void)in, (void)out, (void)shared;                                                 \
    __VA_ARGS__                                                                                                \
  }                                                                                                            \
  CASE(name) { return launch(name, 2, num_threads, sizeof(IntStorage), nullptr, c.in_a<int>(), c.to<int>()); } \
  static_assert(true)

// Barriers.
BAD(bad_exit_before_barrier, 64, if (rank == 40) return; __syncthreads(););
BAD(bad_barrier_in_branch, 64, if (rank < 32) __syncthreads(); else __syncwarp(););
BAD(bad_barrier_against_warp, 32, if (lane < 8) __syncthreads(); else __syncwarp(););
BAD(bad_barrier_kinds, 64, if (rank < 32) __syncthreads(); else __syncthreads_or(1););
BAD(bad_named_barrier_short, 64, if (rank < 32) named_barrier_sync(3, 64););
BAD(bad_named_barrier_count, 64, named_barrier_sync(3, rank < 32 ? 64 : 32););
BAD(bad_named_barrier_id, 64, named_barrier_sync(16, 64););

// Warp functions.
BAD(bad_mask_without_caller, 32, if (lane < 8) out[lane] = __shfl_sync(0x7fu, lane, 0););
BAD(bad_mask_names_exited, 32, if (lane >= 30) return; out[lane] = __shfl_xor_sync(kFullMask, lane, 1););
BAD(bad_mask_names_missing, 40, out[rank] = static_cast<int>(__ballot_sync(kFullMask, 1)););
BAD(bad_functions_mixed, 32, if (lane < 16) out[lane] = __shfl_sync(kFullMask, lane, 0); else __syncwarp(););
BAD(bad_masks_cross, 32, if (lane < 16) __syncwarp(0x0001ffffu); else __syncwarp(0xffff8000u););
BAD(bad_shuffle_unnamed, 32, if (lane < 16) out[lane] = __shfl_sync(0xffffu, lane, 16 + lane););
BAD(bad_shuffle_width, 32, out[lane] = __shfl_sync(kFullMask, lane, 0, 12););
BAD(bad_loop_counts, 32, for (int i = 0; i <= lane / 31; ++i) __syncwarp(););

// Memory.
BAD(bad_shared_past_end, 32, (&shared.v[0])[rank + 128 - 31] = 1;);
BAD(bad_local_index, 32, int own[4]; for (int i = 0; i <= 4 + in[0]; ++i) own[i] = in[i]; out[rank] = own[in[0] % 4];);
BAD(bad_shared_before_start, 32, (&shared.v[0])[rank - 31] = 1;);
BAD(bad_null, 32, int* p = nullptr; asm volatile("" : "+r"(p)); if (lane == 3) * p = 1;);
BAD(bad_trap, 32, if (lane == 3) __trap(););
__global__ void bad_storage() {
  TOKRED_SHARED(IntStorage, shared);
  shared.v[0] = 0;
}
CASE(bad_storage) { return launch(bad_storage, 1, 32, sizeof(IntStorage) - 4, nullptr); }
CASE(bad_block_size) { return launch(bad_storage, 1, 1025, sizeof(IntStorage), nullptr); }
CASE(bad_shared_size) { return launch(bad_storage, 1, 32, 100 << 10, nullptr); }
CASE(bad_grid_size) { return launch(bad_storage, dim3(1, 65536), 32, sizeof(IntStorage), nullptr); }
__device__ int deep(int n) {
  volatile int large[4096];
  large[n % 4096] = n;
  return n == 0 ? 0 : deep(n - 1) + large[n % 4096];
}
BAD(bad_stack, 32, out[lane] = deep(100););
BAD(bad_cp_async_alignment, 32, cp_async_16(&shared.v[1], in););
BAD(bad_cp_async_target, 32, cp_async_16(out, in););
BAD(bad_ldmatrix_alignment, 32, uint32_t r[4]; for (int i = lane; i < 128; i += 32) shared.v[i] = 0; __syncwarp();
    ldmatrix_x4(r, &shared.v[lane]););
BAD(bad_ldmatrix_target, 32, uint32_t r[2]; ldmatrix_x2(r, in););

// A fiber that never leaves this frame, and one that uses the same stack in another way.
BAD(bad_left_array, 32, int own[40]; for (int i = 0; i < 40; ++i) own[i] = in[i]; if (lane == 3) __trap();
    out[lane] = own[in[0] % 40];);
BAD(ok_own_array, 32, int own[400]; for (int i = 0; i < 400; ++i) own[i] = in[i] + lane;
    out[64 * blockIdx.x + lane] = own[in[0] % 400];);
// What only the address build sees.
BAD(address_global_past_end, 32, out[4096 - 31 + lane] = 1;);
BAD(address_global_before_start, 32, if (in[lane - 1] != 7) out[lane] = 1;);

// What the poison shows in every build, and the race build names.
BAD(bad_unwritten, 32, out[lane] = shared.v[lane];);
CASE(bad_async_wait_short) { return run_ring(c, 1); }
CASE(bad_async_no_barrier) { return run_ring(c, 2); }
CASE(bad_async_no_wait) { return run_ring(c, 3); }

// Races.
BAD(race_removed_barrier, 64, shared.v[rank] = rank; out[rank] = shared.v[63 - rank];);
BAD(race_write_after_read, 64, shared.v[rank] = rank; __syncthreads(); const int v = shared.v[63 - rank];
    shared.v[rank] = v + 1;);
BAD(race_write_write, 64, shared.v[rank / 2] = 1;);
BAD(race_no_syncwarp, 32, shared.v[lane] = lane; out[lane] = shared.v[lane ^ 1];);
BAD(race_shuffle_is_no_fence, 32, shared.v[lane] = __shfl_xor_sync(kFullMask, lane, 1); __any_sync(kFullMask, 1);
    out[lane] = shared.v[lane ^ 1];);
BAD(race_syncwarp_across_warps, 64, shared.v[rank] = rank; __syncwarp(); out[rank] = shared.v[rank ^ 32];);
BAD(race_syncwarp_of_halves, 32, shared.v[lane] = lane; __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);
    out[lane] = shared.v[lane ^ 16];);
BAD(
    race_named_barrier_left_out, 96,
    if (rank < 64) {
      shared.v[rank] = rank;
      named_barrier_sync(1, 64);
    } else { out[rank] = shared.v[rank - 64]; });
BAD(race_atomic_and_plain, 64, if (rank == 0) shared.v[0] = 0; __syncthreads(); atomicAdd(&shared.v[0], 1);
    out[rank] = shared.v[0];);
BAD(race_across_blocks, 32, out[lane] = static_cast<int>(blockIdx.x););
BAD(race_global_in_block, 64, out[128 + 64 * blockIdx.x + rank] = rank;
    if (rank == 5) out[0] = out[128 + 64 * blockIdx.x + 37];);
BAD(race_bytes, 64, reinterpret_cast<unsigned char*>(shared.v)[rank / 2] = 1;);
// No races, though they look a little like some.
BAD(ok_bytes, 64, reinterpret_cast<unsigned char*>(shared.v)[rank] = static_cast<unsigned char>(rank); __syncthreads();
    out[64 * blockIdx.x + rank] = reinterpret_cast<unsigned char*>(shared.v)[63 - rank];);
BAD(ok_syncwarp_chain, 32, shared.v[lane] = lane; __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);
    if (lane == 0 || lane == 16) __syncwarp(0x00010001u); __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);
    out[64 * blockIdx.x + lane] = shared.v[lane ^ 16];);
BAD(ok_leader, 64, if (rank == 0) shared.v[7] = 42; __syncthreads(); out[64 * blockIdx.x + rank] = shared.v[7];
    __syncthreads(); if (rank == 63) shared.v[7] = 43;);
#endif

}  // namespace
}  // namespace tokred

SELFTEST_EXPORT int selftest_run(const char* name, const void* a, const void* b, void* out, int n) {
  for (const tokred::Entry* entry = tokred::entries; entry; entry = entry->next) {
    if (std::strcmp(entry->name, name) == 0) return entry->run(tokred::Case{a, b, out, n});
  }
  return -1;
}
SELFTEST_EXPORT const char* selftest_names() {
  static char text[8192];
  text[0] = 0;
  for (const tokred::Entry* entry = tokred::entries; entry; entry = entry->next) {
    std::strcat(std::strcat(text, entry->name), " ");
  }
  return text;
}
SELFTEST_EXPORT const char* selftest_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
