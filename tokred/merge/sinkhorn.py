# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""sinkhorn: the entropic optimal transport plan between two token sets."""

import torch
from torch import Tensor

from tokred import _op


def sinkhorn(
    cost: Tensor,
    *,
    row_mass: Tensor | None = None,
    col_mass: Tensor | None = None,
    row_lens: Tensor | None = None,
    col_lens: Tensor | None = None,
    eps: float = 0.1,
    max_rounds: int = 100,
    tol: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Find how to move the mass of rows to columns at least cost, blurred by an entropy: ``u_i exp(-cost_ij / eps) v_j``.

    Sinkhorn's rounds: each scales the rows to their mass, then the columns; the first starts from ``v = 1``.

    Args:
        cost: ``[batch_size, num_rows, num_cols]``, float32, float16 or bfloat16; any strides, the last dimension contiguous.
            ``inf`` forbids a pair. NaN or ``-inf`` make the whole plan of their problem NaN.
        row_mass: ``[batch_size, num_rows]`` float32, contiguous, not negative; None is ``1 / rows`` each. A row without
            mass, or without an allowed column, gets no plan.
        col_mass: ``[batch_size, num_cols]`` likewise; both masses of a problem should have the same sum (if not, the columns
            get theirs).
        row_lens: ``[batch_size]`` int32: how many rows each problem has; None is all. Clamped to ``[0, num_rows]``; what the
            cost holds beyond them is not looked at.
        col_lens: ``[batch_size]`` int32, likewise.
        eps: Weight of the entropy, in units of the cost, from 1e-30 to 1e30.
        max_rounds: Rounds of each problem, at the most.
        tol: A problem ends with the round that finds the sums of its rows off by less than this, in mass, all rows together.
            0 makes all rounds. float32 does not get below 1e-6 of the mass.

    Returns:
        ``(plan, num_rounds)``.

        - ``plan``: ``[batch_size, num_rows, num_cols]`` float32, zeros beyond the lengths. Its columns sum to their mass to
          float32 accuracy, its rows to theirs within ``tol`` unless ``max_rounds`` ended it.
        - ``num_rounds``: ``[batch_size]`` int32: the rounds made, 0 for a problem without rows or columns.

    Stable for any eps: scalings that grow are absorbed into potentials, and the first round is made in logarithms, so that
    nothing under- or overflows (and where ``cost / eps`` is huge, the plan is that of a cost rounded to float32). Problems
    converge on the device, each for itself, in one launch and without a sync. Deterministic, and the same alone or in a
    batch, padded or not. Shapes depend on shapes alone. Memory beyond the outputs: on CUDA two floats per row and column;
    on CPU the same per thread (and 16 per row where a problem has fewer than 16 columns).

    No gradient: the methods use plans in inference. The module's ``reference`` is differentiable.

    The transport of "Token Reduction via Local and Global Contexts Optimization for Efficient Video Large Language Models"
    (AOT), whose released code makes these rounds without logarithms and stops by the change of ``u``; rounds with absorbed
    scalings are those of "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems" (section 3.1).

    Example:
        >>> plan, rounds = tokred.sinkhorn(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), eps=0.01)
        >>> plan.tolist(), rounds.tolist()
        ([[[0.5, 0.0], [0.0, 0.5]]], [2])
    """
    return torch.ops.tokred.sinkhorn.default(cost, row_mass, col_mass, row_lens, col_lens, eps, max_rounds, tol)


def reference(
    cost: Tensor,
    *,
    row_mass: Tensor | None = None,
    col_mass: Tensor | None = None,
    row_lens: Tensor | None = None,
    col_lens: Tensor | None = None,
    eps: float = 0.1,
    max_rounds: int = 100,
    tol: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Define sinkhorn in plain PyTorch, in logarithms; tests and benchmarks measure against this. float64 stays float64."""
    batch_size, num_rows, num_cols = cost.shape
    value = cost if cost.dtype == torch.float64 else cost.float()

    def side(mass: Tensor | None, lens: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        most = value.new_full((batch_size,), count) if lens is None else lens.clamp(0, count).to(value.dtype)
        live = torch.arange(count, device=cost.device) < most[:, None]
        given = (1 / most[:, None]).expand(batch_size, count) if mass is None else mass.to(value.dtype)
        return live, torch.where(live, given, 0)

    row_live, rows = side(row_mass, row_lens, num_rows)
    col_live, cols = side(col_mass, col_lens, num_cols)
    logit = torch.where(row_live[:, :, None] & col_live[:, None, :], -value / eps, -torch.inf)

    def scaled(mass: Tensor, total: Tensor) -> Tensor:
        """Give the logarithm of mass / exp(total), and -inf where there is nothing to scale."""
        return torch.where((mass == 0) | (total == -torch.inf), -torch.inf, mass.log() - total)

    f, g = torch.zeros_like(rows), torch.where(col_live, 0, -torch.inf).to(value.dtype)
    num_rounds = torch.zeros(batch_size, dtype=torch.int32, device=cost.device)
    done = ~(row_live.any(1) & col_live.any(1)) if num_rows * num_cols else num_rounds == 0
    f = torch.where(done[:, None], -torch.inf, f)
    for i in range(max_rounds):
        if done.all():
            break
        total = torch.logsumexp(logit + g[:, None, :], 2)
        error = ((f + total).exp() - rows).abs().sum(1)
        new_f = scaled(rows, total)
        new_g = scaled(cols, torch.logsumexp(logit + new_f[:, :, None], 1))
        f, g = torch.where(done[:, None], f, new_f), torch.where(done[:, None], g, new_g)
        num_rounds = num_rounds + (~done).int()
        if i > 0:
            done = done | (error < tol)
    return (f[:, :, None] + g[:, None, :] + logit).exp(), num_rounds


@torch.library.register_fake("tokred::sinkhorn")
def _(
    cost: Tensor,
    row_mass: Tensor | None = None,
    col_mass: Tensor | None = None,
    row_lens: Tensor | None = None,
    col_lens: Tensor | None = None,
    eps: float = 0.1,
    max_rounds: int = 100,
    tol: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    return cost.new_empty(cost.shape, dtype=torch.float32), cost.new_empty(cost.shape[:1], dtype=torch.int32)


_op.no_gradient("sinkhorn", "detach the cost, or train through the rounds of reference in tokred/merge/sinkhorn.py")
_op.fold_vmap("sinkhorn")

TOLERANCE = {dtype: (2e-4, 1e-6) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
"""cost / eps is rounded in float32, and a plan multiplies that error by it."""


def floor(
    cost: Tensor,
    *,
    row_mass: Tensor | None = None,
    col_mass: Tensor | None = None,
    row_lens: Tensor | None = None,
    col_lens: Tensor | None = None,
    eps: float = 0.1,
    max_rounds: int = 100,
    tol: float = 1e-4,
) -> _op.Floor:
    """Costs, masses and lengths read once, the plan and the rounds written; the rounds themselves are on the chip."""
    read = sum(t.nbytes for t in (cost, row_mass, col_mass, row_lens, col_lens) if t is not None)
    return read + 4 * cost.numel() + 4 * cost.shape[0], 0


def sample_inputs(device: torch.device | str, dtype: torch.dtype) -> list[_op.Sample]:
    """Return small calls for doctor, opcheck and smoke tests."""
    randn = _op.seeded(device)
    cost = randn(3, 13, 21).abs().to(dtype)
    rows, cols = randn(3, 13).abs() + 0.1, randn(3, 21).abs() + 0.1
    masses = {"row_mass": rows / rows.sum(1, keepdim=True), "col_mass": cols / cols.sum(1, keepdim=True)}
    row_lens, col_lens = (torch.tensor(n, dtype=torch.int32, device=device) for n in ((13, 4, 0), (9, 21, 5)))
    return [
        ((cost,), {"max_rounds": 12, "tol": 0.0}),
        ((cost,), masses),
        ((cost,), {"row_lens": row_lens, "col_lens": col_lens, "eps": 0.3}),
        ((cost[:, :0],), {}),
    ]
