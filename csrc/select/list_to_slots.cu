// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: the list read, a page number per entry, 4 bytes written. One thread per entry; tables stay in the caches.
#include "common/launch.cuh"
#include "select/list_to_slots.h"

namespace tokred {
namespace {

__global__ void __launch_bounds__(kListToSlotsThreads) list_to_slots_kernel(const ListToSlotsArgs args) {
  const int64_t at = int64_t{blockIdx.x} * kListToSlotsThreads + threadIdx.x;
  if (at >= args.batch_size * args.num_heads * args.k) return;
  const int64_t row = at / args.k;
  args.slots[at] = slot_of(args, row, at - row * args.k);
}

}  // namespace

int list_to_slots_cuda(const ListToSlotsArgs& args, CUstream_st* stream) {
  const int64_t blocks = ceil_div<int64_t>(args.batch_size * args.num_heads * args.k, kListToSlotsThreads);
  return launch(list_to_slots_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kListToSlotsThreads), 0, stream, args);
}

}  // namespace tokred
