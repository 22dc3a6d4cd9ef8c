# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Fewer tokens by merging, and back."""

from tokred.merge.bipartite_match import bipartite_match as bipartite_match
from tokred.merge.boundary_map import boundary_map as boundary_map
from tokred.merge.cluster_dpc_knn import cluster_dpc_knn as cluster_dpc_knn
from tokred.merge.cluster_kmeans import cluster_kmeans as cluster_kmeans
from tokred.merge.grid_cells import grid_cells as grid_cells
from tokred.merge.match_both_ways import match_both_ways as match_both_ways
from tokred.merge.merge_attention import merge_attention as merge_attention
from tokred.merge.merge_weight import merge_weight as merge_weight
from tokred.merge.pool_grid import pool_grid as pool_grid
from tokred.merge.segment_expand import segment_expand as segment_expand
from tokred.merge.segment_member import segment_member as segment_member
from tokred.merge.segment_merge import segment_merge as segment_merge
from tokred.merge.segment_pool import segment_pool as segment_pool
from tokred.merge.sinkhorn import sinkhorn as sinkhorn
from tokred.merge.static_windows import static_windows as static_windows
from tokred.merge.virtual_unmerge import virtual_unmerge as virtual_unmerge
