// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#include "torch/glue.h"

#include <torch/headeronly/core/DeviceType.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <array>

#include "common/gemm.h"
#include "common/parallel.h"

namespace tokred {
namespace {

template <typename List>
std::string join(const List& list, int64_t count) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < count; ++i) out << (i ? ", " : "") << list(i);
  out << "]";
  return out.str();
}

}  // namespace

const ParallelFor parallel_for = [](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
};

// Views made here belong to no graph and are no inference tensors, so grad mode of the calling thread does not matter.
const GemmNT gemm_nt = [](const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t depth) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU, 0);
  const auto view = [&](const float* data, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides) {
    return torch::stable::from_blob(const_cast<float*>(data), sizes, strides, cpu, ScalarType::Float);
  };
  std::array<StableIValue, 3> stack{from(view(a, {m, depth}, {depth, 1})), from(view(b, {depth, n}, {1, depth})),
                                    from(view(c, {m, n}, {n, 1}))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // takes over the handle that the call returned
};

std::map<std::string, PlanFunction>& plan_registry() {
  static std::map<std::string, PlanFunction> registry;
  return registry;
}

std::string shape_of(const Tensor& x) {
  return join([&](int64_t i) { return x.size(i); }, x.dim());
}
std::string strides_of(const Tensor& x) {
  return join([&](int64_t i) { return x.stride(i); }, x.dim());
}

std::string dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return concat("scalar type ", static_cast<int>(x.scalar_type()));
  }
}

std::string device_of(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  return x.is_cuda() ? concat("cuda:", int{x.get_device_index()}) : concat("a device of another kind");
}

DType check_float(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::BFloat16:
      return DType::kBF16;
    default:
      break;
  }
  throw std::runtime_error(
      concat(op, ": expected ", name, " of dtype float32, float16 or bfloat16, got ", dtype_of(x)));
}

void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return;
  const char* wanted = dtype == ScalarType::Float  ? "float32"
                       : dtype == ScalarType::Int  ? "int32"
                       : dtype == ScalarType::Long ? "int64"
                       : dtype == ScalarType::Bool ? "bool"
                                                   : "another dtype";
  throw std::runtime_error(concat(op, ": expected ", name, " of dtype ", wanted, ", got ", dtype_of(x)));
}

IndexPtr check_index(const char* op, const char* name, const Tensor& x) {
  TOKRED_CHECK(x.scalar_type() == ScalarType::Long || x.scalar_type() == ScalarType::Int, op, ": expected ", name,
               " of dtype int64 or int32, got ", dtype_of(x));
  check_contiguous(op, name, x);
  return {x.const_data_ptr(), x.scalar_type() == ScalarType::Long};
}

void check_shape(const char* op, const char* name, const Tensor& x, const std::vector<int64_t>& shape,
                 const char* meaning) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == shape[i];
  TOKRED_CHECK(same, op, ": expected ", name, " of shape ", meaning, " = ",
               join([&](int64_t i) { return shape[i]; }, static_cast<int64_t>(shape.size())), ", got ", shape_of(x));
}

void check_last_dim(const char* op, const char* name, const Tensor& x) {
  TOKRED_CHECK(x.dim() > 0 && (x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 || x.numel() == 0), op,
               ": expected ", name, " contiguous in its last dimension, got strides ", strides_of(x));
}

void check_contiguous(const char* op, const char* name, const Tensor& x) {
  TOKRED_CHECK(x.is_contiguous(), op, ": expected ", name, " contiguous, got strides ", strides_of(x));
}

void check_same_device(const char* op, const char* first, const Tensor& x, const char* name, const Tensor& other) {
  const bool same = x.is_cuda() == other.is_cuda() && x.is_cpu() == other.is_cpu() &&
                    (x.is_cpu() || x.get_device_index() == other.get_device_index());
  TOKRED_CHECK(same, op, ": expected ", name, " on the device of ", first, " (", device_of(x), "), got ",
               device_of(other));
}

void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, const char* first, const Tensor& x, const char* name) {
  TOKRED_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op, ": expected ", name,
               " of shape [batch_size + 1], got ", shape_of(cu_seqlens));
  check_dtype(op, name, cu_seqlens, ScalarType::Int);
  check_contiguous(op, name, cu_seqlens);
  check_same_device(op, first, x, name, cu_seqlens);
}

void check_int32_range(const char* op, const char* name, int64_t value) {
  TOKRED_CHECK(value <= INT32_MAX - 1024, op, ": expected ", name, " below 2^31 - 1024, got ", value);
}

KvTensor kv_tensor(const Tensor& x, bool paged) {
  return {x.const_data_ptr(),     x.size(3), paged ? 0 : x.stride(0), x.stride(paged ? 2 : 1), paged ? x.stride(0) : 0,
          x.stride(paged ? 1 : 2)};
}

KvPages check_pages(const char* op, const char* q_name, const Tensor& q, const Tensor& k, const Tensor& page_table) {
  const int64_t page_size = k.size(1);
  TOKRED_CHECK(page_size == 1 || page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128, op,
               ": expected k with page_size 1, 16, 32, 64 or 128, got ", page_size);
  check_dtype(op, "page_table", page_table, ScalarType::Int);
  check_contiguous(op, "page_table", page_table);
  check_same_device(op, q_name, q, "page_table", page_table);
  TOKRED_CHECK(page_table.dim() == 2 && page_table.size(0) == q.size(0), op,
               ": expected page_table of shape [batch_size, max_pages] with batch_size ", q.size(0), ", got ",
               shape_of(page_table));
  check_int32_range(op, "num_pages * page_size", k.size(0) * page_size);
  return {static_cast<const int32_t*>(page_table.const_data_ptr()), k.size(0), page_table.size(1),
          __builtin_ctzll(static_cast<uint64_t>(page_size))};
}

const int32_t* check_kv_lens(const char* op, const char* q_name, const Tensor& q, const OptTensor& kv_lens) {
  if (!kv_lens) return nullptr;
  check_dtype(op, "kv_lens", *kv_lens, ScalarType::Int);
  check_shape(op, "kv_lens", *kv_lens, {q.size(0)}, "[batch_size]");
  check_contiguous(op, "kv_lens", *kv_lens);
  check_same_device(op, q_name, q, "kv_lens", *kv_lens);
  return static_cast<const int32_t*>(kv_lens->const_data_ptr());
}

namespace {

// The first touch of fresh memory costs the kernel a page fault per 4 KiB, which takes longer than the copy that
// touches it. Large results ask for 2 MiB pages instead, as numpy's arrays do, from the same size on. Advice: errors
// are ignored.
void ask_for_huge_pages(const Tensor& x) {
#ifdef __linux__
  constexpr uintptr_t kFrom = 4 << 20, kPage = 4096;
  const uintptr_t bytes = static_cast<uintptr_t>(x.numel()) * x.element_size();
  if (!x.is_cpu() || bytes < kFrom) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr()), first = (begin + kPage - 1) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  // Not by torch::stable::new_empty: it looks the operator up by its name, which takes longer than the allocation.
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * (shape[i] > 1 ? shape[i] : 1);
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), to<int32_t>(from(dtype)), device_type,
                                                         device_index, &handle));
  Tensor x(handle);
  ask_for_huge_pages(x);
  return x;
}

}  // namespace tokred

#if !defined(TOKRED_SIMT) && !defined(TOKRED_WITH_CUDA)

namespace tokred {
OnDevice::OnDevice(const Tensor&) { TOKRED_CHECK(false, "tokred: this build has no CUDA kernels"); }
void check_cuda(const char* op, int error) { TOKRED_CHECK(error == 0, op, ": CUDA error ", error); }
}  // namespace tokred

#else

#include <cuda_runtime_api.h>
#include <dlfcn.h>

namespace tokred {

#if defined(TOKRED_SIMT)
OnDevice::OnDevice(const Tensor&) {}
#else
OnDevice::OnDevice(const Tensor& x)
    : guard_(std::make_unique<torch::stable::accelerator::DeviceGuard>(x.get_device_index())) {
  // Looked up in the library that torch has already loaded: linking against it would tie the build to CUDA torch.
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  TOKRED_CHECK(get_stream, "tokred: got a CUDA tensor, but this torch was built without CUDA");
  void* stream = nullptr;
  TOKRED_CHECK(get_stream(x.get_device_index(), &stream) == 0, "tokred: no current CUDA stream");
  stream_ = static_cast<CUstream_st*>(stream);
}
#endif

void check_cuda(const char* op, int error) {
  TOKRED_CHECK(error == 0, op, ": CUDA error ", error, " (", cudaGetErrorString(static_cast<cudaError_t>(error)),
               "); `python -m tokred doctor` says whether this build fits the GPU");
}

}  // namespace tokred

#endif
