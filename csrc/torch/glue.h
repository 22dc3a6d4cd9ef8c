// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// All that an op's binding shares: stable ABI includes, checks, dtype map, stream, registration. The same binding file
// serves the real library (keys CPU and CUDA) and the emulator's (the CUDA path on CPU tensors); a process loads one.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/kv_tensor.h"
#include "common/plan.h"

// Tensor arguments of an op with gradients must be positional in its schema: torch's register_autograd and
// register_vmap refuse keyword-only tensors. Counts are SymInt in the schema and int64_t here.
#define TOKRED_SCHEMA(m) STABLE_TORCH_LIBRARY_FRAGMENT(tokred, m)
#ifdef TOKRED_SIMT
#define TOKRED_IMPL_CPU(m) [[maybe_unused]] static void tokred_unused_cpu(torch::stable::detail::StableLibrary& m)
#define TOKRED_IMPL_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m)
#else
#define TOKRED_IMPL_CPU(m) STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m)
#ifdef TOKRED_WITH_CUDA
#define TOKRED_IMPL_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m)
#else  // a CPU-only build: no CUDA kernel is registered or linked
#define TOKRED_IMPL_CUDA(m) [[maybe_unused]] static void tokred_unused_cuda(torch::stable::detail::StableLibrary& m)
#endif
#endif

// The message is all that the caller sees: "op: expected argument ..., got ...".
#define TOKRED_CHECK(condition, ...)                                           \
  do {                                                                         \
    if (!(condition)) throw std::runtime_error(::tokred::concat(__VA_ARGS__)); \
  } while (false)

namespace tokred {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  ((out << args), ...);
  return out.str();
}

std::string shape_of(const Tensor& x);    // "[2, 3]"
std::string strides_of(const Tensor& x);  // "[3, 1]"
std::string dtype_of(const Tensor& x);    // "float32"
std::string device_of(const Tensor& x);   // "cuda:0"

// Each check names op and argument.
DType check_float(const char* op, const char* name, const Tensor& x);  // float32, float16 or bfloat16
void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType dtype);
IndexPtr check_index(const char* op, const char* name, const Tensor& x);  // int32 or int64, contiguous
void check_shape(const char* op, const char* name, const Tensor& x, const std::vector<int64_t>& shape,
                 const char* meaning);                                   // meaning: "[batch_size, num_tokens]"
void check_last_dim(const char* op, const char* name, const Tensor& x);  // stride 1 (or at most one element)
void check_contiguous(const char* op, const char* name, const Tensor& x);
void check_same_device(const char* op, const char* first, const Tensor& x, const char* name, const Tensor& other);
// int32 [batch_size + 1], contiguous, on the device of x, the argument first.
void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, const char* first, const Tensor& x,
                      const char* name = "cu_seqlens");
void check_int32_range(const char* op, const char* name, int64_t value);  // a count that kernels hold in an int32

// K or V of four dimensions, dense or in pages.
KvTensor kv_tensor(const Tensor& x, bool paged);
// page_table [batch_size of q, max_pages] of k [num_pages, page_size, num_kv_heads, head_dim].
KvPages check_pages(const char* op, const char* q_name, const Tensor& q, const Tensor& k, const Tensor& page_table);
// int32 [batch_size of q]; null without.
const int32_t* check_kv_lens(const char* op, const char* q_name, const Tensor& q, const OptTensor& kv_lens);

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape) {
  return new_empty(like, shape, like.scalar_type());
}

// A const pointer to an optional tensor's data, or null.
template <typename T>
const T* data_or_null(const OptTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Makes x's device current and knows its current stream; on the emulator it does nothing.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x);
  CUstream_st* stream() const { return stream_; }

 private:
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
  CUstream_st* stream_ = nullptr;
};

void check_cuda(const char* op, int error);  // error: a cudaError_t

}  // namespace tokred
