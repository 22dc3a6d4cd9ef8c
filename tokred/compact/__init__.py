# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Shorter sequences: pruned, gathered, packed."""

from tokred.compact.gather_tokens import gather_tokens as gather_tokens
from tokred.compact.pack_tokens import pack_tokens as pack_tokens
from tokred.compact.prune_topk import prune_topk as prune_topk
from tokred.compact.run_markers import run_markers as run_markers
from tokred.compact.scatter_tokens import scatter_tokens as scatter_tokens
