// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: the lists read, the union written. One block per union: a bit per position in shared memory, set by integer
// atomics (so in any order), then numbered by a prefix sum: no sort. Longer ranges are taken a span at a time, for
// which the lists, by then in the caches, are read again.
#include "common/block.cuh"
#include "common/launch.cuh"
#include "select/list_union.h"

namespace tokred {
namespace {

struct UnionStorage {
  unsigned bits[kListUnionWords];
  BlockScratch block;
};

// grid: num_unions.
__global__ void __launch_bounds__(kListUnionThreads) list_union_kernel(const ListUnionArgs args) {
  TOKRED_SHARED(UnionStorage, shared);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  int64_t* out = args.union_idx + row * args.size;
  int count = 0;  // positions written so far
  for (int64_t begin = 0; begin < args.kv_len; begin += kListUnionSpan) {
    const int64_t span = min(args.kv_len - begin, int64_t{kListUnionSpan});
    const int words = static_cast<int>(ceil_div<int64_t>(span, 32));
    for (int word = thread; word < words; word += kListUnionThreads) shared.bits[word] = 0;
    __syncthreads();  // all bits are clear
    for (int64_t i = thread; i < args.members; i += kListUnionThreads) {
      const int64_t position = args.kept_idx[row * args.members + i] - begin;
      if (position >= 0 && position < span) atomicOr(&shared.bits[position / 32], 1u << (position % 32));
    }
    __syncthreads();  // all bits are set
    for (int tile = 0; tile < words; tile += kListUnionThreads) {
      const int word = tile + thread;
      unsigned left = word < words ? shared.bits[word] : 0u;
      int total;
      int slot = count + block_exclusive_scan(__popc(left), shared.block, &total);
      for (; left != 0; left &= left - 1) out[slot++] = begin + int64_t{word} * 32 + __ffs(static_cast<int>(left)) - 1;
      count += total;
    }
    // The last scan's barrier lets the next span clear the bits.
  }
  for (int64_t slot = count + thread; slot < args.size; slot += kListUnionThreads) out[slot] = -1;
  if (thread == 0) args.num_union[row] = count;
}

}  // namespace

int list_union_cuda(const ListUnionArgs& args, CUstream_st* stream) {
  return launch(list_union_kernel, dim3(static_cast<unsigned>(args.num_unions)), dim3(kListUnionThreads),
                sizeof(UnionStorage), stream, args);
}

}  // namespace tokred
