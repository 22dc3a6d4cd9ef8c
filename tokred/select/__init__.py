# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Which tokens to keep: lists from scores."""

from tokred.select.select_topk import select_topk as select_topk
