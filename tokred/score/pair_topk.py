# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""pair_topk: for each row of one set, the most similar rows of another."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred import _op, _pair


def pair_topk(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    bias: Tensor | None = None,
    drop_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    group_rule: str = "same",
    exclude_self: bool = False,
    cu_seqlens_x: Tensor | None = None,
    cu_seqlens_y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find, for each row of ``x``, the ``k`` rows of ``y`` that are most similar to it, best first.

    ``k = 1`` is the nearest neighbour. ``y`` may be a bank of millions of rows: it streams by, and the matrix of all
    similarities is never stored.

    Args:
        x: ``[batch_size, num_x, dim]``, or packed ``[total_x, dim]`` with ``cu_seqlens_x``; float32, float16 or bfloat16,
            any strides but contiguous in ``dim``.
        y: ``[batch_size, num_y, dim]``; ``[num_y, dim]``, a bank that the whole batch shares; or packed ``[total_y, dim]``.
            Dtype and device of ``x``.
        k: How many to find. Dense: in ``[0, num_y]``. Packed: at least 0.
        metric: ``"cosine"``, of ``v / max(|v|, 1e-12)``; ``"dot"``; or ``"l2"``, minus the squared distance. The least
            similar by cosine or dot are the most similar to ``-x``.
        bias: float32, contiguous, a value per row of ``y`` (``y.shape[:-1]``) that is added to its similarities.
        drop_mask: Bool, as ``bias``: rows of ``y`` that nobody finds, padding among them.
        x_group: int64 or int32, contiguous, a group per row of ``x`` (``x.shape[:-1]``). With ``y_group``.
        y_group: The same per row of ``y``.
        group_rule: ``"same"``: rows find rows of their own group (frame, window) only. ``"other"``: only those of other
            groups; with positions as groups, a row that was taken out of ``y`` does not find itself.
        exclude_self: Row ``i`` of ``x`` does not find row ``i`` of ``y`` (of its sequence).
        cu_seqlens_x: ``[batch_size + 1]`` int32, starts with 0, ends with ``total_x``: the input is packed. Rows find rows
            of their own sequence.
        cu_seqlens_y: The same for ``y``.

    Returns:
        ``(value, idx)``, both ``[batch_size, num_x, k]``, or ``[total_x, k]`` when packed.

        - ``value``: float32, the similarities with their bias, falling; -inf in slots that no row fills.
        - ``idx``: int64, positions in ``y`` (packed: in the sequence), -1 in slots that no row fills: fewer than ``k`` may
          be eligible.

    Ties go to the lowest index; NaN ranks below every number, and is found where nothing else is left.

    Similarities are computed in float32 (for float32 inputs to float32 accuracy on every device, by three TF32 products
    on CUDA) and differ between devices by rounding, about 1e-6 of ``|x| |y|``, or of ``|x|^2 + |y|^2`` with ``"l2"``, which
    is never positive; ``idx`` always equals the selection from the same similarities. Inputs are finite with squared
    norms below 3e38. Deterministic: the same bits for any number of threads and whatever else is in the batch.
    Beside the outputs, the CPU takes tiles of about 4 MiB per thread; where ``x`` is short and ``y`` is shared out, lists
    of the shares take up to 16 MB on the CPU and 9 MB on CUDA. On CUDA, ``y`` passes once for every 32 of ``k``. Shapes
    depend on shapes and ``k`` alone. Not differentiable (``x`` and ``y`` may require grad); no autocast rule: they are
    taken as they come.

    VisionZip's and HiPrune's assignment to targets, PruMerge's neighbours of centres, PiToMe's pairs, nearest codes,
    LatentLens, TokenAdapt, retrieval over a bank.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> bank = torch.tensor([[0.0, 1.0], [3.0, 0.0], [1.0, 1.0]])
        >>> value, idx = tokred.pair_topk(x, bank, 2)
        >>> idx.tolist()
        [[[1, 2], [0, 2]]]
    """
    options = (bias, drop_mask, x_group, y_group, metric, group_rule, exclude_self)
    if cu_seqlens_x is None and cu_seqlens_y is None:
        value, idx = torch.ops.tokred.pair_topk.default(x, y, k, *options)
    else:
        cu_x, cu_y = _pair.both("pair_topk", cu_seqlens_x, cu_seqlens_y)
        value, idx = torch.ops.tokred.pair_topk.packed(x, y, k, cu_x, cu_y, *options)
    return value, idx


def reference(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    bias: Tensor | None = None,
    drop_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    group_rule: str = "same",
    exclude_self: bool = False,
    cu_seqlens_x: Tensor | None = None,
    cu_seqlens_y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Define pair_topk in plain PyTorch; tests and benchmarks measure against this. float64 is computed as such."""
    values, lists = [], []
    parts = _pair.sequences(x, y, bias, drop_mask, x_group, y_group, cu_seqlens_x, cu_seqlens_y)
    for part in parts:
        similar, meets = _pair.similarities(part, metric, group_rule, exclude_self)
        if part.bias is not None:
            similar = similar + part.bias
        order = _rank(similar, meets)[:, :k]
        kept = meets.gather(1, order)
        short = (0, k - order.shape[1])
        values.append(F.pad(similar.gather(1, order).masked_fill(~kept, -torch.inf), short, value=-torch.inf))
        lists.append(F.pad(order.masked_fill(~kept, -1), short, value=-1))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = torch.cat(values) if values else x.new_empty((0, k), dtype=dtype)
    idx = torch.cat(lists) if lists else x.new_empty((0, k), dtype=torch.int64)
    return value.reshape(*x.shape[:-1], k), idx.reshape(*x.shape[:-1], k)


def _rank(value: Tensor, meets: Tensor) -> Tensor:
    """Return each row's columns from best to worst: ties to the lower index, NaN below every number, who meets first."""
    order = value.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
    for key in (
        ~value.isnan(),
        meets,
    ):  # least significant first: each stable sort keeps the order of the ones before it
        order = order.gather(1, key.gather(1, order).byte().argsort(dim=1, descending=True, stable=True))
    return order


def _empty(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("tokred::pair_topk")
def _(x: Tensor, y: Tensor, k: int, *options: Any, **named: Any) -> tuple[Tensor, Tensor]:
    return _empty(x, k)


@torch.library.register_fake("tokred::pair_topk.packed")
def _(x: Tensor, y: Tensor, k: int, cu_x: Tensor, cu_y: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Tensor]:
    return _empty(x, k)


_HINT = "gather rows by its idx and take their similarity in torch, which is differentiable"
_op.no_gradient("pair_topk", _HINT)
_op.no_gradient("pair_topk.packed", _HINT)
_pair.fold_vmap("pair_topk", of_y=(3, 4, 6))


def floor(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    bias: Tensor | None = None,
    drop_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    group_rule: str = "same",
    exclude_self: bool = False,
    cu_seqlens_x: Tensor | None = None,
    cu_seqlens_y: Tensor | None = None,
) -> _op.Floor:
    """Inputs read once, 12 bytes written per slot; the product of all pairs. Packed: as if sequences were equally long."""
    inputs = (x, y, bias, drop_mask, x_group, y_group, cu_seqlens_x, cu_seqlens_y)
    rows = x.numel() // max(x.shape[-1], 1)
    written = 12 * rows * k
    return sum(t.nbytes for t in inputs if t is not None) + written, _pair.flops(x, y, cu_seqlens_x)


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    x, y, bank = randn(2, 9, 24, dtype=dtype), randn(2, 13, 24, dtype=dtype), randn(70, 24, dtype=dtype)
    bias, groups = randn(2, 13), torch.arange(26, device=device).reshape(2, 13) % 3
    packed = {
        "cu_seqlens_x": torch.tensor([0, 3, 3, 18], dtype=torch.int32, device=device),
        "cu_seqlens_y": torch.tensor([0, 3, 20, 26], dtype=torch.int32, device=device),
    }
    return [
        ((x, y, 1), {}),
        ((x, y, 4), {"bias": bias, "drop_mask": bias > 1, "metric": "dot", "exclude_self": True}),
        ((x, y, 3), {"x_group": groups[:, :9].contiguous(), "y_group": groups, "metric": "l2"}),
        ((x, bank, 40), {"metric": "l2"}),
        ((x, y, 0), {}),
        ((x.flatten(0, 1), y.flatten(0, 1), 5), packed),
    ]
