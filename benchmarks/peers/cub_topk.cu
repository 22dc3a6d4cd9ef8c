// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// cub::DeviceTopK behind a C function, for cub.py. With scratch null, only its size is returned.
#include <cub/device/device_topk.cuh>
#include <cuda/iterator>

extern "C" int tokred_cub_topk(void* scratch, size_t* scratch_bytes, const float* score, float* keys, int* idx,
                               int num_tokens, int k, cudaStream_t stream) {
  const auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                     cuda::execution::output_ordering::unsorted);
  const auto env = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  return cub::DeviceTopK::MaxPairs(scratch, *scratch_bytes, score, keys, cuda::counting_iterator<int>{0}, idx,
                                   num_tokens, k, env);
}
