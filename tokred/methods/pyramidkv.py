# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""PyramidKV: SnapKV's selection with budgets that fall from the first layer to the last."""

from torch import Tensor

from tokred.methods import Method, Reduced
from tokred.methods.snapkv import snapkv

METHOD = Method(
    name="pyramidkv",
    paper="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    stage="prefill, KV",
    basis="authors' code",
    deviations=(
        "As those of SnapKV: one list per kv head, original order, float32 scores, ties to the lowest index.",
        "In a padded batch budgets follow from the longest prompt.",
    ),
    compat={"released": "a list per query head; keys and values are repeated for it"},
)


def layer_budgets(keep: int, num_tokens: int, *, num_layers: int, window: int = 64, beta: int = 20) -> list[int]:
    """Return how many tokens each layer keeps, its window among them: ``keep`` on average, from about twice that to few.

    The last layer has ``1 / beta`` of the average beside its window, unless the prompt is too short for what then falls to
    the first one. Differences are whole numbers, rounded down.
    """
    base = keep - window
    if num_tokens <= keep or num_layers == 1:
        return [min(keep, num_tokens)] * num_layers
    low = base // beta
    high = 2 * base - low
    if high >= num_tokens - window:
        high = num_tokens - window
        low = 2 * base - high
    step = (high - low) // (num_layers - 1)
    return [window + high - layer * step for layer in range(num_layers)]


def pyramidkv(
    k: Tensor,
    v: Tensor,
    q: Tensor | None = None,
    *,
    keep: int,
    layer: int,
    num_layers: int,
    beta: int = 20,
    window: int = 64,
    kernel: int = 5,
    pooling: str = "avg",
    score: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    compat: str | None = None,
) -> Reduced:
    """Keep as many tokens per head as ``layer_budgets`` gives the layer: the window, and the best by pooled attention from it.

    Args:
        k: Keys of the prompt, rotated, ``[batch_size, num_kv_heads, num_tokens, head_dim]``.
        v: Values, likewise.
        q: Queries of the last ``window`` tokens, rotated, ``[batch_size, num_q_heads, window, head_dim]``.
        keep: Tokens per head on average over layers, the window's among them.
        layer: The layer's number, from 0.
        num_layers: How many layers there are.
        beta: How steep the pyramid is.
        window: The observation window, always kept.
        kernel: Of the pooling along tokens, odd.
        pooling: "avg" or "max".
        score: Instead of ``q``, as ``tokred.methods.snapkv`` takes it. Needed with ``kv_lens``.
        kv_lens: ``[batch_size]``, lengths of prompts that are padded at their end.
        scale: Of the logits, ``head_dim ** -0.5`` by default.
        compat: None, or "released" (see ``METHOD``).

    Returns:
        ``Reduced`` as ``tokred.methods.snapkv`` returns it.

    Source: the paper's arithmetic sequence of budgets; the authors' code for its ends and roundings.
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"pyramidkv: expected layer in [0, {num_layers}), got {layer}")
    budgets = layer_budgets(keep, k.shape[2], num_layers=num_layers, window=window, beta=beta)
    return snapkv(
        k, v, q, keep=max(budgets[layer], window), window=window, kernel=kernel, pooling=pooling, score=score,
        kv_lens=kv_lens, scale=scale, compat=compat,
    )  # fmt: skip
