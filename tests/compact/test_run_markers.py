# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.compact.run_markers")
reference, floor = module.reference, module.floor


def test_floor_by_hand():
    meta = {"device": "meta"}  # floors look at shapes and dtypes alone
    keep = torch.empty(2, 6400, dtype=torch.bool, **meta)
    assert floor(keep) == (2 * 6400 * 3 + 2 * 4, 0)
    assert floor(keep[0], cu_seqlens=torch.empty(9, dtype=torch.int32, **meta)) == (6400 * 3 + 8 * 4 + 9 * 4, 0)


def check(keep, **options):
    actual = tokred.run_markers(keep, **options)
    assert_close(actual, reference(keep, **options), name="run_markers")
    return actual


# Around a vector of the CPU, the 2,048 tokens of a block, and (three rows) the 2^16 of a piece on the CPU.
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 64, 65, 682, 683, 2047, 2049, 6400, 30001])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_sizes(device, num_tokens, share):
    check((torch.rand(3, num_tokens) < share).to(device))


@given(st.data())
def test_any_mask(data):
    """One marker per run, on its last token."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bits = data.draw(st.lists(st.booleans(), max_size=40))
    kept_or_marker, marker, num_runs = check(torch.tensor([bits], dtype=torch.bool, device=device))
    runs, start = [], None
    for i, bit in enumerate([*bits, True]):
        if bit and start is not None:
            runs.append(i - 1)
        start = None if bit else i if start is None else start
    assert marker[0].nonzero()[:, 0].tolist() == runs and num_runs.tolist() == [len(runs)]
    kept = {i for i, bit in enumerate(bits) if bit}
    assert set(kept_or_marker[0].nonzero()[:, 0].tolist()) == kept | set(runs)
    assert len(runs) <= min(len(kept) + 1, len(bits) - len(kept))


def test_ragged(device):
    """A run ends with its sequence: what follows belongs to another one."""
    lens = [5, 0, 700, 33, 1, 1]
    cu_seqlens = torch.tensor([0, *lens], device=device).cumsum(0).int()
    keep = (torch.rand(sum(lens)) < 0.3).to(device)
    keep[4:8] = False
    keep[-2:] = False  # sequences of one token
    kept_or_marker, marker, num_runs = check(keep, cu_seqlens=cu_seqlens)
    assert marker[4] and not marker[5] and marker[-2:].all()
    for b, (start, length) in enumerate(zip(cu_seqlens.tolist(), lens)):
        part = slice(start, start + length)
        alone = tokred.run_markers(keep[None, part])
        assert_close(kept_or_marker[part], alone[0][0])
        assert_close(marker[part], alone[1][0])
        assert int(num_runs[b]) == int(alone[2])


def test_bad_offsets_write_nothing_out_of_bounds(device):
    keep = torch.zeros(30, dtype=torch.bool, device=device)
    cu_seqlens = torch.tensor([0, -5, 2**30, 2**30, 5], dtype=torch.int32, device=device)
    assert tokred.run_markers(keep, cu_seqlens=cu_seqlens)[2].tolist() == [0, 1, 0, 0]
    # What no sequence holds is written all the same.
    few = torch.tensor([0, 10], dtype=torch.int32, device=device)
    for _ in range(5):
        kept_or_marker, marker, num_runs = tokred.run_markers(~keep, cu_seqlens=few)
        assert kept_or_marker.all() and not marker.any() and num_runs.tolist() == [0]


def test_views_and_empty(device):
    base = (torch.rand(5 * 33 + 1) < 0.5).to(device)
    check(base[1:].reshape(5, 33))  # misaligned
    assert check(base[:0].reshape(3, 0))[2].tolist() == [0, 0, 0]
    assert check(base[:0].reshape(0, 3))[2].shape == (0,)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    assert check(base[:0], cu_seqlens=none)[2].shape == (0,)


def test_offsets_beyond_2_31(device):
    base = torch.empty(2**31 + 4096, dtype=torch.bool, device=device)
    keep = base[2**31 + 7 :][:600].reshape(2, 300)
    keep.copy_(torch.rand(2, 300) < 0.5)
    check(keep)
    with pytest.raises(RuntimeError, match="run_markers: expected the tokens of keep below 2"):
        tokred.run_markers(base[None])


def test_row_is_independent_of_its_batch(device, threads):
    keep = (torch.rand(9, 3000) < 0.4).to(device)
    alone = [tokred.run_markers(row[None]) for row in keep]
    for result in threads(lambda: tokred.run_markers(keep)):
        for got, parts in zip(result, zip(*alone)):
            assert_close(got, torch.cat(parts))


def test_vmap(device):
    keep = (torch.rand(3, 2, 11) < 0.5).to(device)
    mapped = torch.vmap(tokred.run_markers)(keep)
    for i in range(3):
        assert_close([m[i] for m in mapped], tokred.run_markers(keep[i]))
    with pytest.raises(RuntimeError, match="run_markers: a packed input has no batch dimension"):
        torch.vmap(lambda m: tokred.run_markers(m, cu_seqlens=torch.tensor([0, 2]).int()))(keep[0])


ERRORS = {
    "expected keep of shape [batch_size, num_tokens], got [6]": lambda m: tokred.run_markers(m[0]),
    "expected keep of shape [total_tokens] (with cu_seqlens), got [2, 6]": (
        lambda m: tokred.run_markers(m, cu_seqlens=torch.tensor([0, 6], device=m.device).int())
    ),
    "expected keep of dtype bool, got float32": lambda m: tokred.run_markers(m.float()),
    "expected keep contiguous, got strides [6, 2]": lambda m: tokred.run_markers(m[:, ::2]),
    "expected cu_seqlens of dtype int32, got int64": (
        lambda m: tokred.run_markers(m[0], cu_seqlens=torch.tensor([0, 6], device=m.device))
    ),
    "expected cu_seqlens of shape [batch_size + 1], got []": (
        lambda m: tokred.run_markers(m[0], cu_seqlens=torch.tensor(0, device=m.device).int())
    ),
    "expected cu_seqlens contiguous, got strides [2]": (
        lambda m: tokred.run_markers(m[0], cu_seqlens=torch.tensor([0, 1, 6, 1], device=m.device).int()[::2])
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.ones(2, 6, dtype=torch.bool, device=device))
    assert f"run_markers: {message}" in str(caught.value)
