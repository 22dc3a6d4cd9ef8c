# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""row_similarity: aligned rows of two tensors compared by cosine, product, distance or ratio of their norms."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokred import _op

EPS = 1e-12  # the least norm that is divided by

# Sums of float32 products of values around 1; every result is float32, whatever the input.
TOLERANCE = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), (1e-5, 2e-5))


def row_similarity(x: Tensor, y: Tensor, measure: str | Sequence[str] = "cosine") -> Tensor | tuple[Tensor, ...]:
    """Compare each row of ``x`` with the row of ``y`` at the same place, by one measure or by several in one pass.

    With ``|v|' = max(|v|, 1e-12)``:

    - ``"cosine"``: ``x . y / (|x|' |y|')``; 0 for a row of zeros.
    - ``"dot"``: ``x . y``.
    - ``"l2"``: ``|x - y|``, from the differences, so that rows that are nearly equal keep their digits.
    - ``"norm_ratio"``: ``|x| / |y|'``.

    Args:
        x: ``[..., num_tokens, dim]`` of 2 to 4 dimensions by strides, float32, float16 or bfloat16; contiguous in ``dim``.
            Packed tokens are such rows.
        y: Of the same dtype and shape, likewise; a size of 1 stands for all (one mean vector per image).
        measure: One of the above, or several, each once.

    Returns:
        Float32 of the shape of ``x`` without ``dim``; for several measures a tuple, in their order.

    Sums are float32, and a row's bits do not depend on its strides, its alignment or its batch. NaN in a row is NaN in each
    of its measures; so are infinities where a difference or a quotient of them is, and norms beyond 1.8e19 are inf.
    Deterministic; CPU and CUDA agree up to rounding. ``x`` and ``y`` are read once; no memory beyond the outputs. Shapes
    depend on shapes alone. Differentiable in both; a norm of 0 has gradient 0.

    Frames of a video with the frames before them (EVS), a block's input with its output (TransPrune, skipping of layers),
    keys with their mean (KeyDiff).

    Example:
        >>> video = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[6.0, 8.0], [2.0, 0.0]]])  # frames, tokens, dim
        >>> tokred.row_similarity(video[1:], video[:-1]).tolist()
        [[1.0, 0.0]]
        >>> ratio, distance = tokred.row_similarity(video[1], video[0], ("norm_ratio", "l2"))
        >>> ratio.tolist(), distance[0].item()
        ([2.0, 1.0], 5.0)
    """
    if y.dim() == x.dim() and y.shape != x.shape and all(b in (1, a) for a, b in zip(x.shape[:-1], y.shape)):
        y = y.expand(*x.shape[:-1], -1)
    several = not isinstance(measure, str)
    out = torch.ops.tokred.row_similarity.default(x, y, ",".join(measure) if several else measure)
    return tuple(out) if several else out[0]


def reference(x: Tensor, y: Tensor, measure: str | Sequence[str] = "cosine") -> Tensor | tuple[Tensor, ...]:
    """Define row_similarity in plain PyTorch, in float64; tests and benchmarks measure against this."""
    x, y = x.double(), y.double()
    norm_x, norm_y = x.norm(dim=-1), y.norm(dim=-1)
    values = {
        "cosine": lambda: (x * y).sum(-1) / (norm_x.clamp(min=EPS) * norm_y.clamp(min=EPS)),
        "dot": lambda: (x * y).sum(-1),
        "l2": lambda: (x - y).norm(dim=-1),
        "norm_ratio": lambda: norm_x / norm_y.clamp(min=EPS),
    }
    if isinstance(measure, str):
        return values[measure]().float()
    return tuple(values[name]().float() for name in measure)


@torch.library.register_fake("tokred::row_similarity")
def _(x: Tensor, y: Tensor, measures: str) -> list[Tensor]:
    return [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in measures.split(",")]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, y, ctx.measures = inputs
    ctx.save_for_backward(x, y)


def _backward(ctx: Any, grads: list[Any]) -> tuple[Any, ...]:
    x, y = ctx.saved_tensors
    op = torch.ops.tokred.row_similarity.default
    dot, l2 = op(x, y, "dot,l2")
    norm_x, norm_y = (op(t, t, "dot")[0].sqrt() for t in (x, y))
    # 1 / |v|' and, where |v| is what counts in it, the factor of v in its own derivative.
    inv_x, inv_y = (1 / norm.clamp(min=EPS) for norm in (norm_x, norm_y))
    own_x, own_y = (torch.where(norm > EPS, inv * inv, 0) for norm, inv in ((norm_x, inv_x), (norm_y, inv_y)))
    # Factors of x and of y in their own gradients, of each in the other one's, and of the difference of both.
    of_x = of_y = mixed = apart = torch.zeros_like(dot)
    names = ctx.measures.split(",")
    for name, g in zip(names, grads):
        if g is None:
            continue
        if name == "dot":
            mixed = mixed + g
        elif name == "cosine":
            cosine = dot * inv_x * inv_y
            mixed, of_x, of_y = mixed + g * inv_x * inv_y, of_x - g * cosine * own_x, of_y - g * cosine * own_y
        elif name == "norm_ratio":
            of_x = of_x + torch.where(norm_x > 0, g * inv_y / norm_x, 0)
            of_y = of_y - g * norm_x * inv_y * own_y
        else:
            apart = apart + torch.where(l2 > 0, g / l2, 0)
    of_x, of_y, mixed, apart = (t[..., None] for t in (of_x, of_y, mixed, apart))
    u, v = x.float(), y.float()
    difference = apart * (u - v) if "l2" in names else 0
    grad_x = (of_x * u + mixed * v + difference).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_y = (of_y * v + mixed * u - difference).to(y.dtype) if ctx.needs_input_grad[1] else None
    return grad_x, grad_y, None


torch.library.register_autograd("tokred::row_similarity", _backward, setup_context=_setup)
_op.fold_vmap("row_similarity")


def floor(x: Tensor, y: Tensor, measure: str | Sequence[str] = "cosine") -> _op.Floor:
    """X and Y read once, a float per row and measure written."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return x.nbytes + y.nbytes + 4 * rows * (1 if isinstance(measure, str) else len(measure)), 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    video = randn(2, 3, 7, 40, dtype=dtype)
    x, y = randn(29, 24, dtype=dtype), randn(29, 24, dtype=dtype)
    return [
        ((video[:, 1:], video[:, :-1]), {}),
        ((x, y), {"measure": ("norm_ratio", "cosine", "l2", "dot")}),
        ((video[0], video[1, :, :1]), {"measure": "l2"}),
    ]
