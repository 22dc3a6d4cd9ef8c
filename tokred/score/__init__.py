# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Importance of tokens."""

from tokred.score.attn_received import attn_received as attn_received
from tokred.score.block_summary import block_summary as block_summary
from tokred.score.page_bound_score import page_bound_score as page_bound_score
from tokred.score.pair_reduce import pair_reduce as pair_reduce
from tokred.score.pair_topk import pair_topk as pair_topk
from tokred.score.qk_score import qk_score as qk_score
from tokred.score.row_similarity import row_similarity as row_similarity
