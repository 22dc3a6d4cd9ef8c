// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// What a call would launch on CUDA, without making it: tokred._native.plan. What it moves is the `floor` of the op's
// Python module.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace tokred {

struct PlannedLaunch {
  std::string kernel;
  int64_t grid[3] = {1, 1, 1};
  int64_t block = 1;
};

struct Plan {
  std::vector<PlannedLaunch> launches;  // in order
};

// The sizes of a call by name, for example batch_size, num_tokens, dim, k, element_size.
class PlanSizes {
 public:
  explicit PlanSizes(std::map<std::string, int64_t> sizes) : sizes_(std::move(sizes)) {}
  int64_t operator[](const char* name) const {
    const auto it = sizes_.find(name);
    if (it == sizes_.end()) throw std::invalid_argument(std::string("plan: expected a size named ") + name);
    return it->second;
  }
  int64_t get(const char* name, int64_t fallback) const {
    const auto it = sizes_.find(name);
    return it == sizes_.end() ? fallback : it->second;
  }

 private:
  std::map<std::string, int64_t> sizes_;
};

using PlanFunction = Plan (*)(const PlanSizes& sizes);
// The one registry; exported so that tokred._native can read it.
__attribute__((visibility("default"))) std::map<std::string, PlanFunction>& plan_registry();

// In NAME.cpp: TOKRED_PLAN(prune_topk, plan_prune_topk)
#define TOKRED_PLAN(op, function)                                   \
  [[maybe_unused]] static const bool tokred_plan_##op = [] {        \
    return ::tokred::plan_registry().emplace(#op, function).second; \
  }();

}  // namespace tokred
