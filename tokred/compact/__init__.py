# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Shorter sequences: pruned, gathered, packed, restored."""

from tokred.compact.compose_index import compose_index as compose_index
from tokred.compact.gather_tokens import gather_tokens as gather_tokens
from tokred.compact.insert_tokens import insert_tokens as insert_tokens
from tokred.compact.mrope_rebuild import mrope_rebuild as mrope_rebuild
from tokred.compact.pack_lists import pack_lists as pack_lists
from tokred.compact.pack_tokens import pack_tokens as pack_tokens
from tokred.compact.prune_attn import prune_attn as prune_attn
from tokred.compact.prune_topk import prune_topk as prune_topk
from tokred.compact.run_markers import run_markers as run_markers
from tokred.compact.scatter_tokens import scatter_tokens as scatter_tokens
