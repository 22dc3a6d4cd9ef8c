// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
// tokred._native: build facts, device capability, launch plans. No op goes through it; tokred works without it.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/plan.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = TOKRED_VERSION;
  info["compiler"] = __VERSION__;
  info["cxx"] = static_cast<long>(__cplusplus);
  return info;
}

// (major, minor) of each GPU, by the driver alone; empty without a driver.
std::vector<std::pair<int, int>> device_capabilities() {
  std::vector<std::pair<int, int>> found;
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (!driver) return found;
  const auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  const auto count = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  const auto attribute = reinterpret_cast<int (*)(int*, int, int)>(dlsym(driver, "cuDeviceGetAttribute"));
  constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
  int devices = 0;
  if (!init || !count || !attribute || init(0) != 0 || count(&devices) != 0) return found;
  for (int i = 0; i < devices; ++i) {
    int major = 0, minor = 0;
    if (attribute(&major, kMajor, i) == 0 && attribute(&minor, kMinor, i) == 0) found.emplace_back(major, minor);
  }
  return found;
}

py::dict plan(const std::string& op, const std::map<std::string, int64_t>& sizes) {
  const auto& registry = tokred::plan_registry();
  const auto it = registry.find(op);
  if (it == registry.end()) throw py::key_error("plan: no op named " + op);
  const tokred::Plan made = it->second(tokred::PlanSizes(sizes));
  py::list launches;
  for (const auto& launch : made.launches) {
    py::dict row;
    row["kernel"] = launch.kernel;
    row["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
    row["block"] = launch.block;
    launches.append(row);
  }
  py::dict out;
  out["launches"] = launches;
  return out;
}

std::vector<std::string> planned_ops() {
  std::vector<std::string> names;
  for (const auto& entry : tokred::plan_registry()) names.push_back(entry.first);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build facts, device capability and launch plans of tokred.";
  m.def("build_info", &build_info, "Compiler and version that built the library.");
  m.def("device_capabilities", &device_capabilities, "Compute capability of each GPU, asked of the driver.");
  m.def("plan", &plan, py::arg("op"), py::arg("sizes"), "Launches of a call with the given sizes.");
  m.def("planned_ops", &planned_ops, "Ops that have a plan.");
}
