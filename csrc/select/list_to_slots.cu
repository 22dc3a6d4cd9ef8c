// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// Floor: the list read, a page number per entry, 4 bytes written. One thread per entry; tables stay in the caches.
#include "common/launch.cuh"
#include "select/list_to_slots.h"

namespace tokred {
namespace {

// grid: lists * blocks_per_list.
__global__ void __launch_bounds__(kListToSlotsThreads)
    list_to_slots_kernel(const ListToSlotsArgs args, unsigned blocks_per_list) {
  const int64_t row = blockIdx.x / blocks_per_list;
  const int64_t entry = int64_t{blockIdx.x % blocks_per_list} * kListToSlotsThreads + threadIdx.x;
  if (entry >= args.k) return;
  const int64_t at = row * args.k + entry;
  args.slots[at] = slot_of(args, slot_list(args, row), args.kept_idx[at]);
}

}  // namespace

int list_to_slots_cuda(const ListToSlotsArgs& args, CUstream_st* stream) {
  const unsigned blocks_per_list = static_cast<unsigned>(ceil_div<int64_t>(args.k, kListToSlotsThreads));
  return launch(list_to_slots_kernel, dim3(static_cast<unsigned>(args.batch_size * args.num_heads) * blocks_per_list),
                dim3(kListToSlotsThreads), 0, stream, args, blocks_per_list);
}

}  // namespace tokred
