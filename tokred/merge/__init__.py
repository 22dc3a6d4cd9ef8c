# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Fewer tokens by merging, and back."""

from tokred.merge.bipartite_match import bipartite_match as bipartite_match
from tokred.merge.merge_weight import merge_weight as merge_weight
from tokred.merge.segment_expand import segment_expand as segment_expand
from tokred.merge.segment_member import segment_member as segment_member
from tokred.merge.segment_merge import segment_merge as segment_merge
from tokred.merge.sinkhorn import sinkhorn as sinkhorn
