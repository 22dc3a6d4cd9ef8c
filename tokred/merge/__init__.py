# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Fewer tokens by merging, and back."""

from tokred.merge.bipartite_match import bipartite_match as bipartite_match
from tokred.merge.grid_cells import grid_cells as grid_cells
from tokred.merge.match_both_ways import match_both_ways as match_both_ways
from tokred.merge.segment_expand import segment_expand as segment_expand
from tokred.merge.segment_merge import segment_merge as segment_merge
