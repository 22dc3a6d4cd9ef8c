// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The tokred authors
#pragma once

namespace tokred {

// Exponentials are taken as powers of two: e^x = 2^(x * kLog2e).
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

}  // namespace tokred
