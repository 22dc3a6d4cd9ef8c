# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Which tokens to keep."""

from tokred.select.select_diverse import select_diverse as select_diverse
