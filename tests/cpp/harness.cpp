// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
//   tokred_cpp_tests [--list] [OP | OP/NAME]...
#include "harness.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "common/gemm.h"
#include "common/parallel.h"

#ifdef TOKRED_TEST_DEVICE
#include <cuda_runtime_api.h>
#endif

namespace tokred {
namespace {
int num_threads = 1;
}

// What csrc/torch/ defines in the library. As many pieces as there are threads, however small: a kernel must not care.
const ParallelFor parallel_for = [](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t piece = ceil_div(n, int64_t{num_threads});
  std::vector<std::thread> threads;
  for (int64_t begin = piece; begin < n; begin += piece) threads.emplace_back(body, begin, std::min(begin + piece, n));
  if (n > 0) body(0, std::min(piece, n));
  for (std::thread& thread : threads) thread.join();
};

const GemmNT gemm_nt = [](const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t depth) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0.f;
      for (int64_t d = 0; d < depth; ++d) sum += a[i * depth + d] * b[j * depth + d];
      c[i * n + j] = sum;
    }
  }
};

namespace test {
namespace {

#if defined(TOKRED_TEST_CUDA)
constexpr const char* kFlavour = "cuda";
#elif defined(TOKRED_SIMT)
constexpr const char* kFlavour = "emulator";
#else
constexpr const char* kFlavour = "cpu";
#endif

struct Test {
  std::string name;
  void (*body)();
};
std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
int failures = 0;  // of the test that runs

void fail(const std::string& message) {
  ++failures;
  std::printf("  %s\n", message.c_str());
}

#ifdef TOKRED_TEST_DEVICE
bool poisons() {
  const char* wish = std::getenv("TOKRED_CPP_POISON");
  return !wish || std::strcmp(wish, "0") != 0;
}
#endif

#ifdef TOKRED_TEST_CUDA
void must(const char* call, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(text(call, ": ", cudaGetErrorString(error)));
}
#endif

}  // namespace

Register::Register(const char* op, const char* name, void (*body)()) { tests().push_back({text(op, "/", name), body}); }

#ifdef TOKRED_TEST_DEVICE
void check_launch(const char* op, int error) {
  if (error != 0) throw std::runtime_error(text(op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error))));
}
#endif

Memory::Memory(const Side& side, size_t bytes) : on_device_(side.on_device), data_(nullptr) {
#ifdef TOKRED_TEST_CUDA
  if (on_device_) {
    if (bytes) must("cudaMalloc", cudaMalloc(&data_, bytes));
    if (bytes && poisons()) must("cudaMemset", cudaMemset(data_, 0xff, bytes));
    return;
  }
#endif
  data_ = std::malloc(bytes);
  if (!data_ && bytes) throw std::bad_alloc();
#ifdef TOKRED_TEST_DEVICE
  if (bytes && poisons()) std::memset(data_, 0xff, bytes);
#endif
}

Memory::~Memory() {
#ifdef TOKRED_TEST_CUDA
  if (on_device_) {
    (void)cudaFree(data_);  // an error of a kernel has been reported by read() before
    return;
  }
#endif
  std::free(data_);
}

void Memory::fill(size_t at, const void* from, size_t bytes) {
  if (bytes == 0) return;
#ifdef TOKRED_TEST_CUDA
  if (on_device_) {
    must("cudaMemcpy", cudaMemcpy(data() + at, from, bytes, cudaMemcpyHostToDevice));
    return;
  }
#endif
  std::memcpy(data() + at, from, bytes);
}

void Memory::read(size_t at, void* to, size_t bytes) const {
  if (bytes == 0) return;
#ifdef TOKRED_TEST_CUDA
  if (on_device_) {
    must("cudaMemcpy", cudaMemcpy(to, data() + at, bytes, cudaMemcpyDeviceToHost));  // waits for the kernel
    return;
  }
#endif
  std::memcpy(to, data() + at, bytes);
}

void compare(const std::string& what, const Results& first, const Results& second, bool exact) {
  for (size_t e = 0; e < first.entries_.size(); ++e) {
    const auto &a = first.entries_[e], &b = second.entries_[e];
    int64_t wrong = 0, at = -1;
    for (size_t i = 0; i < a.values.size(); ++i) {
      const double x = a.values[i], y = b.values[i];
      const double limit = exact ? 0 : a.atol + a.rtol * std::fabs(x);
      if (x == y || (x != x && y != y) || std::fabs(x - y) <= limit) continue;
      if (wrong++ == 0) at = static_cast<int64_t>(i);
    }
    if (wrong == 0) continue;
    const auto i = static_cast<size_t>(at);
    fail(text(what, ": ", a.name, ": ", wrong, " of ", a.values.size(), " differ, first at ", at, ": ", b.values[i],
              " instead of ", a.values[i]));
  }
}

void check(const std::string& what, const std::function<Results(const Side&)>& call) {
#ifdef TOKRED_TEST_DEVICE
  const Side sides[2] = {{false, 1}, {true, 1}};
#else
  const Side sides[2] = {{false, 1}, {false, 3}};
#endif
  Results results[2];
  for (int i = 0; i < 2; ++i) {
    num_threads = sides[i].threads;
    try {
      results[i] = call(sides[i]);
    } catch (const std::exception& error) {
      return fail(text(what, ": ", error.what()));
    }
  }
  compare(what, results[0], results[1], /*exact=*/!sides[1].on_device);
}

uint64_t Random::next() {  // splitmix64
  uint64_t z = state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

float Random::normal() {  // the sum of four uniform numbers, scaled
  const uint64_t bits = next();
  float sum = -2.f;
  for (int i = 0; i < 4; ++i) sum += static_cast<float>(bits >> (16 * i) & 0xffff) * 0x1p-16f;
  return sum * 1.7320508f;
}

}  // namespace test
}  // namespace tokred

int main(int argc, char** argv) {
  using namespace tokred::test;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--list") == 0) {
      for (const Test& test : tests()) std::printf("%s\n", test.name.c_str());
      return 0;
    }
    wanted.emplace_back(argv[i]);
  }
#ifdef TOKRED_TEST_CUDA
  int devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess || devices == 0) {
    std::printf("tokred_cpp_tests: no CUDA device: %s\n", cudaGetErrorString(error));
    return 2;
  }
#endif
  int run = 0, failed = 0;
  for (const Test& test : tests()) {
    bool chosen = wanted.empty();
    for (const std::string& name : wanted) {
      chosen = chosen || test.name == name || test.name.compare(0, name.size() + 1, name + "/") == 0;
    }
    if (!chosen) continue;
    failures = 0;
    const auto start = std::chrono::steady_clock::now();
    test.body();
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start);
    std::printf("%s %s (%d ms)\n", failures ? "FAILED" : "passed", test.name.c_str(), static_cast<int>(ms.count()));
    ++run;
    failed += failures > 0;
  }
  if (run == 0) {
    std::printf("tokred_cpp_tests: expected names out of --list, got none of them\n");
    return 2;
  }
  std::printf("%s: %d of %d tests passed\n", kFlavour, run - failed, run);
  return failed > 0;
}
