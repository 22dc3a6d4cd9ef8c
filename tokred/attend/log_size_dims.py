# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""log_size_dims: attention weighted by token size, through any attention kernel."""

import torch
from torch import Tensor

PARTS = 3  # that a logarithm is split into: three of bfloat16's 8 bits hold float32's 24
PADDING = 8  # dimensions added: kernels want head dimensions that are multiples of 8
LOWEST = -(2.0**15)  # each part of a size of 0: every dtype has it, and no gradient meets an infinity


def log_size_dims(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Extend q, k and v so that ``softmax(scale * q k^T) v`` becomes ``softmax(scale * q k^T + log(size)) v``.

    Eight more dimensions carry the logarithm: ones in ``q``, ``log(size) / scale`` in ``k`` in three parts of the dtype's
    precision each, zeros in ``v``. So any attention kernel serves merged tokens, without a bias that would switch the fast
    ones off.

    Args:
        q: ``[batch_size, num_q_heads, q_len, head_dim]``, float32, float16 or bfloat16.
        k: ``[batch_size, num_kv_heads, kv_len, head_dim]``, the dtype of ``q``.
        v: ``[batch_size, num_kv_heads, kv_len, head_dim_v]``.
        size: ``[batch_size, kv_len]`` or ``[batch_size, num_kv_heads, kv_len]`` float32: how many tokens a key stands for. 0
            hides a key, for padding: its weight is 0 in float32 for a scale of 0.002 and more.
        scale: Factor of the logits; ``head_dim ** -0.5`` by default.

    Returns:
        ``(q, k, v, scale)``, with ``head_dim + 8`` and ``head_dim_v + 8`` dimensions. Pass the scale on, or the kernel takes
        that of the longer heads, and cut the output: ``sdpa(q, k, v, scale=scale)[..., :head_dim_v]``.

    A composite of three concatenations. Deterministic; shapes depend on shapes alone. Differentiable in ``q``, ``k``, ``v``
    and, as far as the dtype's rounding tells, in ``size``.

    Source: proportional attention of "Token Merging: Your ViT But Faster" (section 3), which adds ``log(size)`` to the logits.
    The kernel's log-sum-exp is that of the weighted softmax, as ``attn_received`` takes it with the extended ``q`` and ``k``.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4, 16).unbind(0)
        >>> size = torch.tensor([[1.0, 3.0, 1.0, 2.0]])
        >>> q8, k8, v8, scale = tokred.log_size_dims(q, k, v, size)
        >>> sdpa = torch.nn.functional.scaled_dot_product_attention
        >>> expected = sdpa(q, k, v, attn_mask=size.log()[:, None, None])
        >>> torch.allclose(sdpa(q8, k8, v8, scale=scale)[..., :16], expected, atol=1e-5)
        True
    """
    if size.dim() not in (2, 3) or size.shape[-1] != k.shape[2] or size.shape[0] != k.shape[0]:
        raise RuntimeError(
            "log_size_dims: expected size of shape [batch_size, kv_len] or [batch_size, num_kv_heads, kv_len] with "
            f"batch_size {k.shape[0]} and kv_len {k.shape[-2]}, got {list(size.shape)}"
        )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    of_heads = size if size.dim() == 3 else size[:, None]
    hidden = of_heads <= 0
    rest = torch.where(hidden, 1, of_heads).float().log() / factor
    parts = []
    for _ in range(PARTS):
        part = rest.to(k.dtype)
        rest = (rest - part.float()).detach()  # the first part has the gradient
        parts.append(torch.where(hidden, LOWEST, part))

    def extended(t: Tensor, columns: Tensor) -> Tensor:
        return torch.cat([t, columns.expand(*t.shape[:-1], PADDING)], -1)

    ones = torch.cat([q.new_ones(PARTS), q.new_zeros(PADDING - PARTS)])
    logs = torch.stack(parts + [torch.zeros_like(parts[0])] * (PADDING - PARTS), -1)
    return extended(q, ones), extended(k, logs), extended(v, v.new_zeros(PADDING)), factor
