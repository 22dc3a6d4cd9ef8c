# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Fewer tokens by merging, and back."""

from tokred.merge.bipartite_match import bipartite_match as bipartite_match
