# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""segment_expand: every token gets the row it was merged into."""

from typing import Any

import torch
from torch import Tensor

from tokred import _op


def segment_expand(y: Tensor, dst_idx: Tensor) -> Tensor:
    """Copy to each token the row that ``dst_idx`` sent it to: ``out[b, i] = y[b, dst_idx[b, i]]``, "unmerge".

    Args:
        y: Rows, ``[batch_size, num_out, dim]``, any dtype; any strides, the last dimension contiguous.
        dst_idx: ``[batch_size, num_tokens]`` int64 or int32, contiguous: the row of each token, as ``segment_merge``
            takes it.

    Returns:
        ``[batch_size, num_tokens, dim]``, the dtype of ``y``. A token whose id is outside ``[0, num_out)`` (-1 by
        convention) gets zeros.

    A copy, bit for bit: deterministic, equal on all devices. Shapes depend on shapes alone. Differentiable in ``y``
    (float32, float16, bfloat16): the gradient of a row is the sum over its tokens, added in float32 in ascending order
    by ``segment_merge``.

    The unmerge of "Token Merging for Fast Stable Diffusion" (section 4.1), for any map.

    Example:
        >>> y = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> tokred.segment_expand(y, torch.tensor([[1, 0, 1, -1]])).tolist()
        [[[3.0, 4.0], [1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]]
    """
    return torch.ops.tokred.segment_expand.default(y, dst_idx)


def reference(y: Tensor, dst_idx: Tensor) -> Tensor:
    """Define segment_expand in plain PyTorch; tests and benchmarks measure against this."""
    num_out = y.shape[1]
    kept = (dst_idx >= 0) & (dst_idx < num_out)
    padded = torch.cat([y, y.new_zeros((y.shape[0], 1, y.shape[2]))], dim=1)  # dropped tokens copy the last row
    dst = torch.where(kept, dst_idx.long(), num_out)
    return padded.gather(1, dst[..., None].expand(*dst.shape, y.shape[2]))


@torch.library.register_fake("tokred::segment_expand")
def _(y: Tensor, dst_idx: Tensor) -> Tensor:
    return y.new_empty((*dst_idx.shape, y.shape[2]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.num_out = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (dst_idx,) = ctx.saved_tensors
    return torch.ops.tokred.segment_merge.default(grad.contiguous(), dst_idx, ctx.num_out, None, None, "sum")[0], None


torch.library.register_autograd("tokred::segment_expand", _backward, setup_context=_setup)
_op.fold_vmap("segment_expand")


def floor(y: Tensor, dst_idx: Tensor) -> _op.Floor:
    """Each row of ``y`` that can be asked for read once, each output row written, the map read."""
    batch_size, num_out, dim = y.shape
    rows = dst_idx.numel() + batch_size * min(num_out, dst_idx.shape[1])
    return dst_idx.nbytes + rows * dim * y.itemsize, 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    y = _op.seeded(device)(2, 6, 24, dtype=dtype)
    dst_idx = torch.tensor([[0, 1, 1, 4, -1, 2, 0, 0, 5, 9], [3] * 10], device=device)
    return [((y, dst_idx), {}), ((y[:, :0], dst_idx.int()), {})]
