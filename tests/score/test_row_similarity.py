# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.score.row_similarity")
reference, floor = module.reference, module.floor
similarity = tokred.row_similarity

ALL = ("cosine", "dot", "l2", "norm_ratio")


def test_floor_by_hand():
    x = torch.empty(2, 1000, 64, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    assert floor(x, x) == (2 * 2000 * 128 + 2000 * 4, 0)
    assert floor(x, x[:, :1], ALL) == (2000 * 128 + 2 * 128 + 4 * 2000 * 4, 0)


def check(x, y):
    """All measures at once against the definition; each alone has the same bits."""
    found = similarity(x, y, ALL)
    norms = x.double().norm(dim=-1) * y.double().norm(dim=-1)
    expected = reference(x, y, ALL)
    for name, ours, want in zip(ALL, found, expected):
        assert ours.dtype == torch.float32 and ours.shape == x.shape[:-1]
        scale = norms.float() if name == "dot" else 1.0  # a product may cancel; its error is one of its terms
        assert_close(ours / scale, want / scale, rtol=2e-6, atol=1e-6, name=name)
        assert_close(similarity(x, y, name), ours, rtol=0, atol=0, name=name)
    return found


def draw(device, dtype, *shape):
    return (torch.randn(*shape) + 0.1).to(device, dtype)


@pytest.mark.parametrize("dim", [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40, 63, 64, 72, 128, 255, 256, 511, 520, 1100])
def test_dims(device, dtype, dim):
    for rows in (1, 2, 37):
        check(draw(device, dtype, rows, dim), draw(device, dtype, rows, dim))


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24), (2, 3, 5, 24)])
def test_views(device, dtype, shape):
    x, y = draw(device, dtype, *shape), draw(device, dtype, *shape)
    expected = check(x, y)
    unaligned = [
        F.pad(t, (1, 2))[..., 1:-2] for t in (x, y)
    ]  # rows that allow no wide load: the same order of additions
    assert_close(similarity(unaligned[0], y, ALL), expected, rtol=0, atol=0)
    assert_close(similarity(x, unaligned[1], ALL), expected, rtol=0, atol=0)
    swapped = x.transpose(0, -2).contiguous().transpose(0, -2)
    assert_close(similarity(swapped, y, ALL), expected, rtol=0, atol=0)


def test_one_row_for_all(device, dtype):
    x, mean = draw(device, dtype, 2, 9, 40), draw(device, dtype, 2, 1, 40)
    expected = check(x, mean.expand(2, 9, 40).contiguous())
    assert_close(similarity(x, mean, ALL), expected, rtol=0, atol=0)
    assert_close(similarity(x, mean[:1], ALL), similarity(x, mean[:1].expand(2, 9, 40), ALL), rtol=0, atol=0)


def test_frames_and_those_before(device, dtype):
    video = draw(device, dtype, 4, 6, 32)
    found = similarity(video[1:], video[:-1])
    for t in range(3):
        assert_close(found[t], F.cosine_similarity(video[t + 1].float(), video[t].float(), dim=-1))


def test_known_values(device):
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], device=device)
    y = torch.tensor([[6.0, 8.0], [1.0, 2.0], [0.0, 0.0]], device=device)
    cosine, dot, l2, ratio = similarity(x, y, ALL)
    assert cosine.tolist() == [1.0, 0.0, 0.0] and dot.tolist() == [50.0, 0.0, 0.0]
    assert l2[0] == 5 and l2[2] == 1 and ratio[:2].tolist() == [0.5, 0.0] and ratio[2] > 1e11


def test_near_rows_keep_their_digits(device):
    """|x|^2 + |y|^2 - 2 x.y would be 0 or noise here."""
    x = draw(device, torch.float32, 5, 64)
    y = x.clone()
    y[:, 3] += 2.0**-14
    exact = (x.double() - y.double()).norm(dim=-1)
    assert_close(similarity(x, y, "l2"), exact, rtol=1e-6, atol=0)


def test_nan_and_inf(device, dtype):
    x, y = draw(device, dtype, 6, 24), draw(device, dtype, 6, 24)
    x[0, 23] = torch.nan
    y[1, 0] = torch.nan
    x[2, 5] = torch.inf
    y[3, 5] = -torch.inf
    x[4, 1] = y[4, 1] = torch.inf
    for name, ours, want in zip(ALL, similarity(x, y, ALL), reference(x, y, ALL)):
        # Infinite norms: float64 and float32 agree on which values are NaN or infinite.
        assert torch.equal(ours.isnan(), want.isnan()) and torch.equal(ours.isinf(), want.isinf()), name
        assert ours[:2].isnan().all() and ours[5].isfinite()


def test_empty(device):
    x = draw(device, torch.float32, 2, 3, 8)
    assert similarity(x[:0], x[:0]).shape == (0, 3)
    assert similarity(x[:, :0], x[:, :0]).shape == (2, 0)
    for found in similarity(x[..., :0], x[..., :0], ALL):
        assert found.tolist() == [[0.0] * 3] * 2


def test_offsets_beyond_2_31(device):
    huge = torch.empty(2**32 + 4096, dtype=torch.bfloat16, device=device)
    x = huge.as_strided((3, 64), (2**31 + 8, 1))
    y = draw(device, torch.bfloat16, 3, 64)
    x[:] = draw(device, torch.bfloat16, 3, 64)
    assert_close(similarity(x, y, ALL), similarity(x.contiguous(), y, ALL), rtol=0, atol=0)
    assert_close(similarity(y, x, ALL), similarity(y, x.contiguous(), ALL), rtol=0, atol=0)


def test_threads_and_batch_do_not_change_bits(device, dtype, threads):
    x, y = draw(device, dtype, 3, 401, 72), draw(device, dtype, 3, 401, 72)
    first, *rest = threads(lambda: similarity(x, y, ALL))
    for other in rest:
        assert_close(other, first, rtol=0, atol=0)
    for part in (slice(0, 1), slice(1, 400), slice(400, 401)):  # as the first or second of a pair, or alone
        alone = similarity(x[1, part], y[1, part], ALL)
        assert_close(alone, tuple(t[1, part] for t in first), rtol=0, atol=0)


@given(st.data())
def test_any_shape(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    shape = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3))
    dim = data.draw(st.integers(1, 300))
    x, y = draw(device, dtype, *shape, dim), draw(device, dtype, *shape, dim)
    wide = draw(device, dtype, *shape, dim + 3)
    check(x if data.draw(st.booleans()) else wide[..., data.draw(st.integers(0, 3)) :][..., :dim], y)


@pytest.mark.parametrize("measure", [*ALL, ALL, ("l2", "cosine")])
def test_gradients(device, dtype, measure):
    x, y = draw(device, dtype, 3, 5, 24), draw(device, dtype, 3, 1, 24)
    with torch.no_grad():
        x[0, 0] = 0  # norms of 0: the gradient is that of the reference, 0 where it has a kink
        x[0, 1] = y[0, 0]
    one, other = (tuple(t.clone().requires_grad_() for t in (x, y)) for _ in range(2))
    results = []
    for (a, b), f in ((one, similarity), (other, reference)):
        out = f(a, b, measure)
        out = (out,) if isinstance(measure, str) else out
        sum((t * (i + 1) * torch.arange(1.0, 6.0, device=device)).sum() for i, t in enumerate(out)).backward()
        results.append((a.grad, b.grad))
    rtol = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]  # roundings of each term of y's sum
    assert_close(results[0], results[1], rtol=rtol, atol=10 * rtol)


def test_gradient_of_near_rows(device):
    x = draw(device, torch.float32, 4, 32)
    y = (x + 2.0**-16 * draw(device, torch.float32, 4, 32)).detach()
    x.requires_grad_()
    similarity(x, y, "l2").sum().backward()
    assert_close(x.grad, F.normalize(x.detach() - y, dim=-1), rtol=1e-4, atol=1e-5)


def test_vmap(device):
    x, y = draw(device, torch.float32, 3, 2, 5, 8), draw(device, torch.float32, 2, 5, 8)
    mapped = torch.vmap(lambda x: similarity(x, y, ALL))(x)
    for i in range(3):
        assert_close(tuple(t[i] for t in mapped), similarity(x[i], y, ALL), rtol=0, atol=0)
    assert_close(torch.vmap(similarity)(x, x.flip(0))[1], similarity(x[1], x[1]), rtol=0, atol=0)


ERRORS = {
    "expected x of shape [..., num_tokens, dim] with 2 to 4 dimensions, got [8]": lambda x: similarity(
        x[0, 0], x[0, 0]
    ),
    "expected x of shape [..., num_tokens, dim] with 2 to 4 dimensions, got [1, 1, 2, 5, 8]": (
        lambda x: similarity(x[None, None], x[None, None])
    ),
    "expected x of dtype float32, float16 or bfloat16, got int64": lambda x: similarity(x.long(), x.long()),
    "expected y of the dtype of x (float32), got float16": lambda x: similarity(x, x.half()),
    "expected y of shape [..., num_tokens, dim] = [2, 5, 8], got [2, 4, 8]": lambda x: similarity(x, x[:, 1:]),
    "expected y of shape [..., num_tokens, dim] = [2, 5, 8], got [5, 8]": lambda x: similarity(x, x[0]),
    "expected y of shape [..., num_tokens, dim] = [2, 5, 8], got [2, 5, 1]": lambda x: similarity(x, x[..., :1]),
    "expected x contiguous in its last dimension, got strides": lambda x: similarity(x[..., ::2], x[..., :4]),
    "expected y contiguous in its last dimension, got strides": lambda x: similarity(x[..., :4], x[..., ::2]),
    "expected measure to be cosine, dot, l2 or norm_ratio, got l1": lambda x: similarity(x, x, "l1"),
    "expected measure to be cosine, dot, l2 or norm_ratio, got dot ": lambda x: similarity(x, x, ["l2", "dot "]),
    "expected each measure once, got l2,dot,l2": lambda x: similarity(x, x, ("l2", "dot", "l2")),
    "expected a measure, got none": lambda x: similarity(x, x, ()),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.zeros(2, 5, 8, device=device))
    assert f"row_similarity: {message}" in str(caught.value)
