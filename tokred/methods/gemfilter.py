# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""GemFilter: keep the prompt tokens that the last query of an early layer points to, and run the model on them alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from tokred.methods import Method, Reduced

METHOD = Method(
    name="gemfilter",
    paper="Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction",
    stage="prefill",
    basis="authors' code",
    deviations=(
        "Scores are float32; the released code rounds product, head sum and pooling to the model's dtype, where they tie.",
        "Batches of prompts of different lengths; the released code takes one prompt.",
        "Ties go to the lowest index.",
    ),
)


def gemfilter(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    keep: int = 1024,
    pool: int = 5,
    kv_lens: Tensor | None = None,
    page_table: Tensor | None = None,
) -> Reduced:
    """Keep the ``keep`` tokens with the highest pooled logits of the last query, summed over heads.

    Args:
        x: What is cut down: input ids ``[batch_size, num_tokens]``, or embeddings ``[batch_size, num_tokens, dim]``. The
            model then runs on them from its first layer, at positions ``0, 1, ...``.
        q: Query of each prompt's last token at the filter layer (13 of Llama 3.1 8B, 19 of Mistral Nemo and Phi 3.5), after
            RoPE, ``[batch_size, num_q_heads, 1, head_dim]``.
        k: Keys of that layer, after RoPE, ``[batch_size, num_kv_heads, num_tokens, head_dim]``, or pages.
        keep: How many tokens to keep; a shorter prompt is kept whole.
        pool: Odd window of the average over neighbours; beyond the ends of the prompt they count as 0.
        kv_lens: ``[batch_size]`` int32, lengths of the prompts in a padded batch.
        page_table: ``[batch_size, max_pages]`` int32 for ``k`` in pages (see ``tokred.qk_score``).

    Returns:
        ``Reduced`` with ``x``, ``kept_idx`` in original order, the pooled ``score`` and ``num_kept``; rows of zeros and -1
        past it.

    Source: the authors' selection over the last query row: no scale, no softmax, one list for the whole model.
    """
    if q.shape[2] != 1:
        raise ValueError(f"gemfilter: expected q of shape [batch_size, num_q_heads, 1, head_dim], got {list(q.shape)}")
    num_tokens = x.shape[1]
    logits = tokred.qk_score(q, k, page_table=page_table, kv_lens=kv_lens, sum_heads=True)[:, 0, :num_tokens]
    beyond = torch.zeros_like(logits, dtype=torch.bool)
    if kv_lens is not None:
        beyond = torch.arange(num_tokens, device=x.device) >= kv_lens[:, None]
    score = F.avg_pool1d(logits.masked_fill(beyond, 0), pool, 1, pool // 2)
    kept_idx, num_kept = tokred.select_topk(score, min(keep, num_tokens), drop_mask=beyond, return_num_kept=True)
    return Reduced(tokred.gather_tokens([x], kept_idx)[0], kept_idx=kept_idx, score=score, num_kept=num_kept)
