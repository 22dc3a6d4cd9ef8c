# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Comparison that says what differs."""

from typing import Any

import torch
from torch import Tensor

#: (rtol, atol) for an output in that dtype that was computed in float32 and rounded once. float32 allows for sums in
#: another order; the others for one rounding to the nearest (2^-11, 2^-8) of a value that itself differs that little.
TOLERANCE = {torch.float32: (2e-5, 1e-5), torch.float16: (1e-3, 1e-4), torch.bfloat16: (8e-3, 1e-3)}


def assert_close(
    actual: Any, expected: Any, *, rtol: float | None = None, atol: float | None = None, name: str = "output"
) -> None:
    """Compare tensors, or lists and tuples of them; integers and bools exactly, NaN and inf by their places first.

    Args:
        actual: What the op returned.
        expected: What the reference returned; a floating tensor may have a wider dtype than ``actual``.
        rtol: Relative tolerance; by default TOLERANCE of the dtype of ``actual``.
        atol: Absolute tolerance, likewise.
        name: Used in the message.
    """
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{name}: expected {len(expected)} outputs, got {len(actual)}"
        for i, (a, e) in enumerate(zip(actual, expected)):
            assert_close(a, e, rtol=rtol, atol=atol, name=f"{name}[{i}]")
        return
    assert isinstance(actual, Tensor), f"{name}: expected a tensor, got {type(actual).__name__}"
    assert actual.shape == expected.shape, f"{name}: expected shape {list(expected.shape)}, got {list(actual.shape)}"
    if not actual.is_floating_point():
        assert actual.dtype == expected.dtype, f"{name}: expected {expected.dtype}, got {actual.dtype}"
        wrong = actual != expected
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: "
                f"{actual[tuple(at)].item()} instead of {expected[tuple(at)].item()}"
            )
        return
    default = TOLERANCE.get(actual.dtype, (1e-12, 1e-12))
    rtol = default[0] if rtol is None else rtol
    atol = default[1] if atol is None else atol
    a, e = actual.double(), expected.double()
    for kind, places in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = places(a) != places(e)
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{name}: {kind} in other places, first at {at}: {a[tuple(at)].item()} instead of {e[tuple(at)].item()}"
            )
    finite = torch.isfinite(e)
    error = torch.where(finite, (a - e).abs(), 0.0)
    limit = torch.where(finite, atol + rtol * e.abs(), 0.0)
    wrong = error > limit
    if wrong.any():
        excess = (error - limit).argmax()
        index = torch.unravel_index(excess, error.shape)
        at = [int(i) for i in index]
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} differ by more than {atol} + {rtol} * |expected|, "
            f"worst at {at}: {a[index].item()} instead of {e[index].item()}"
        )
