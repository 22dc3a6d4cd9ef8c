// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors

// Kernels use c10::Half and c10::BFloat16, whose conversions are C++; CUDA's own half types have no twin.
#pragma once
#include "cuda_runtime.h"
