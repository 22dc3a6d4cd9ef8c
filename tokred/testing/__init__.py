# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Tools that the tests and benchmarks share, and that users of the ops may want: comparison and timing."""

from tokred.testing.compare import assert_close as assert_close
