# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""pair_reduce: for each row of one set, a sum over its similarities with another."""

from typing import Any

import torch
from torch import Tensor

from tokred import _op, _pair


def pair_reduce(
    x: Tensor,
    y: Tensor,
    fn: str = "mean",
    param: float | None = None,
    *,
    metric: str = "cosine",
    drop_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    group_rule: str = "same",
    exclude_self: bool = False,
    cu_seqlens_x: Tensor | None = None,
    cu_seqlens_y: Tensor | None = None,
) -> Tensor:
    """Reduce, for each row of ``x``, a function of its similarities ``s`` with all rows of ``y``.

    ==================  ===========================================================================================
    ``"mean"``          the mean of ``s`` (LRS-VQA, FocusUI; minus it: redundancy)
    ``"sum"``           the sum of ``s`` (SliME)
    ``"count_above"``   how many ``s > param`` (TokenCorrCompressor)
    ``"softmax_mean"``  the sum of ``s * softmax(s / param)`` (FlashVLM, 0.05)
    ``"elu_margin"``    the mean of ``s - param`` where positive, else ``exp(s - param) - 1`` (PiToMe's energy)
    ``"gauss"``         the mean of ``exp(-((1 - s) / param)^2 / 2)``, made for cosines (PiToMe for text, densities)
    ==================  ===========================================================================================

    The matrix of all similarities is never stored.

    Args:
        x: ``[batch_size, num_x, dim]``, or packed ``[total_x, dim]`` with ``cu_seqlens_x``; float32, float16 or bfloat16,
            any strides but contiguous in ``dim``.
        y: ``[batch_size, num_y, dim]``; ``[num_y, dim]``, a bank that the whole batch shares; or packed ``[total_y, dim]``.
            Dtype and device of ``x``.
        fn: One of the table.
        param: Of the functions that have one; above 0 with ``"softmax_mean"`` and ``"gauss"``.
        metric: ``"cosine"``, of ``v / max(|v|, 1e-12)``; ``"dot"``; or ``"l2"``, minus the squared distance.
        drop_mask: Bool, contiguous, a value per row of ``y`` (``y.shape[:-1]``): rows that nobody meets, padding among them.
        x_group: int64 or int32, contiguous, a group per row of ``x`` (``x.shape[:-1]``). With ``y_group``.
        y_group: The same per row of ``y``.
        group_rule: ``"same"``: rows meet rows of their own group (frame, window) only. ``"other"``: only those of others.
        exclude_self: Row ``i`` of ``x`` does not meet row ``i`` of ``y`` (of its sequence).
        cu_seqlens_x: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_x``: the input is packed. Rows meet rows
            of their own sequence.
        cu_seqlens_y: The same for ``y``.

    Returns:
        float32 ``[batch_size, num_x]``, or ``[total_x]`` when packed. 0 where a row meets nobody; NaN where a similarity is
        NaN, except for ``"count_above"``, which NaN does not reach.

    Similarities are computed in float32 (for float32 inputs to float32 accuracy on every device, by three TF32 products
    on CUDA), summed in float32 over up to 2,048 rows or a 32nd of ``y``, and in double precision beyond. Devices differ
    by rounding, counts where a similarity is within rounding of ``param``. Inputs are finite with squared norms below
    3e38. Deterministic: the order of additions follows from positions in the sequence alone, so the same bits for any
    number of threads and whatever else is in the batch. Beside the output, 24 bytes per row of ``x`` for each of at most
    32 shares of ``y``, and tiles of about 4 MiB per thread on the CPU. Shapes depend on shapes alone. Not differentiable (``x``
    and ``y`` may require grad); no autocast rule: they are taken as they come.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
        >>> tokred.pair_reduce(x, x, "count_above", 0.5, exclude_self=True).tolist()
        [[1.0, 1.0, 2.0]]
    """
    options = (drop_mask, x_group, y_group, fn, param, metric, group_rule, exclude_self)
    if cu_seqlens_x is None and cu_seqlens_y is None:
        out: Tensor = torch.ops.tokred.pair_reduce.default(x, y, *options)
        return out
    cu_x, cu_y = _pair.both("pair_reduce", cu_seqlens_x, cu_seqlens_y)
    out = torch.ops.tokred.pair_reduce.packed(x, y, cu_x, cu_y, *options)
    return out


def _reduce(similar: Tensor, meets: Tensor, fn: str, param: float) -> Tensor:
    """Return the reduction of each row of ``[num_x, num_y]``."""
    if fn == "softmax_mean":
        weight = (similar / param).masked_fill(~meets, -torch.inf).softmax(dim=1)
        none = ~meets.any(dim=1, keepdim=True)
        return (weight * similar).masked_fill(~meets | none, 0).sum(1)
    if fn == "count_above":
        similar = (similar > param).to(similar.dtype)
    elif fn == "elu_margin":
        away = similar - param
        similar = torch.where(away > 0, away, away.expm1())
    elif fn == "gauss":
        similar = (-((1 - similar) / param).square() / 2).exp()
    total = similar.masked_fill(~meets, 0).sum(1)
    return total if fn in ("sum", "count_above") else total / meets.sum(1).clamp(min=1)


def reference(
    x: Tensor,
    y: Tensor,
    fn: str = "mean",
    param: float | None = None,
    *,
    metric: str = "cosine",
    drop_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    group_rule: str = "same",
    exclude_self: bool = False,
    cu_seqlens_x: Tensor | None = None,
    cu_seqlens_y: Tensor | None = None,
) -> Tensor:
    """Define pair_reduce in plain PyTorch; tests and benchmarks measure against this. float64 is computed as such."""
    rows = [x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)]
    for part in _pair.sequences(x, y, None, drop_mask, x_group, y_group, cu_seqlens_x, cu_seqlens_y):
        similar, meets = _pair.similarities(part, metric, group_rule, exclude_self)
        rows.append(_reduce(similar, meets, fn, param or 0.0))
    return torch.cat(rows).reshape(x.shape[:-1])


@torch.library.register_fake("tokred::pair_reduce")
def _(x: Tensor, y: Tensor, *options: Any, **named: Any) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("tokred::pair_reduce.packed")
def _(x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor, *options: Any, **named: Any) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


_HINT = "reduce the similarities in torch, x @ y.transpose(-1, -2), which is differentiable"
_op.no_gradient("pair_reduce", _HINT)
_op.no_gradient("pair_reduce.packed", _HINT)
_pair.fold_vmap("pair_reduce", of_y=(2, 4))


def floor(
    x: Tensor,
    y: Tensor,
    fn: str = "mean",
    param: float | None = None,
    *,
    metric: str = "cosine",
    drop_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    group_rule: str = "same",
    exclude_self: bool = False,
    cu_seqlens_x: Tensor | None = None,
    cu_seqlens_y: Tensor | None = None,
) -> _op.Floor:
    """Inputs read once, 4 bytes written per row; the product of all pairs. Packed: as if sequences were equally long.

    Sums and means of products need less, ``x`` times the sum of ``y``; they are no reason to count less for the others.
    """
    inputs = (x, y, drop_mask, x_group, y_group, cu_seqlens_x, cu_seqlens_y)
    written = 4 * (x.numel() // max(x.shape[-1], 1))
    return sum(t.nbytes for t in inputs if t is not None) + written, _pair.flops(x, y, cu_seqlens_x)


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x, y, bank = randn(2, 9, 24, dtype=dtype), randn(2, 13, 24, dtype=dtype), randn(70, 24, dtype=dtype)
    drop, groups = randn(2, 13) > 1, torch.arange(26, device=device).reshape(2, 13) % 3
    packed = {
        "cu_seqlens_x": torch.tensor([0, 3, 3, 18], dtype=torch.int32, device=device),
        "cu_seqlens_y": torch.tensor([0, 3, 20, 26], dtype=torch.int32, device=device),
    }
    return [
        ((x, y), {}),
        ((x, y, "sum"), {"drop_mask": drop, "metric": "dot", "exclude_self": True}),
        ((x, y, "elu_margin", 0.4), {"x_group": groups[:, :9].contiguous(), "y_group": groups}),
        ((x, bank, "softmax_mean", 0.05), {}),
        ((x, bank, "gauss", 0.5), {}),
        ((x.flatten(0, 1), y.flatten(0, 1), "count_above", 0.1), packed),
    ]
