# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Each function of csrc/common/*.cuh does what its comment says: on the emulator (plain, and without a false alarm of
the race detector) and, where there is one, on the GPU, by the same expectations."""

import pytest
import torch


def ints(n, high=100):
    return torch.randint(high, (n,), dtype=torch.int32)


def whole(*shape):
    """Whole numbers whose products and sums are exact in any order: a wrong layout shows in every bit."""
    return torch.randint(-8, 9, shape).float()


def assert_sums(build, out, c, a, b, split=0.0):
    """Compare out with c + a b: exactly where whole numbers allow it, else up to what the tensor core rounds, relative to
    the sum of the magnitudes; split: what the operands have lost before."""
    c, a, b = c.double(), a.double(), b.double()
    error, magnitude = (out.double() - c - a @ b).abs(), c.abs() + a.abs() @ b.abs()
    exact = all((x == x.round()).all() for x in (c, a, b))
    limit = 0.0 if exact else build.rounding + split
    assert (error <= limit * magnitude).all(), f"off by {(error / magnitude).max():.3g} of the magnitude"


def test_warp_functions(build, seed):
    v = ints(32)
    out = torch.zeros(21, 32, dtype=torch.int32)
    assert build.run("ok_warp_functions", v, out=out) is None
    lane = torch.arange(32)
    odd = int(sum(1 << i for i in range(32) if v[i] % 2))

    def signed(x):
        return (x + 2**31) % 2**32 - 2**31

    same = [sum(1 << j for j in range(32) if v[j] % 4 == v[i] % 4) for i in range(32)]
    xor = 0
    for x in v.tolist():
        xor ^= x
    expected = [
        v[5].expand(32),
        v[lane // 8 * 8 + 3],
        v[torch.where(lane >= 3, lane - 3, lane)],
        v[torch.where(lane % 16 >= 3, lane - 3, lane)],
        v[torch.where(lane + 7 < 32, lane + 7, lane)],
        v[torch.where(lane % 4 + 2 < 4, lane + 2, lane)],
        v[lane ^ 21],
        # Lanes may read groups below their own, not above (PTX ISA, shfl.bfly).
        v[torch.where((lane ^ 9) <= lane // 8 * 8 + 7, lane ^ 9, lane)],
        torch.full((32,), signed(odd)),
        torch.full((32,), 1 + 2 * bool((v == v[7]).all())),
        torch.tensor([signed(s) for s in same]),
        torch.full((32,), signed(2**32 - 1) + 2),
        torch.zeros(32),
        v.sum().expand(32),
        v.min().expand(32),
        v.max().expand(32),
        torch.full((32,), xor),
        v.sum().expand(32),
        v.view(4, 8).amax(1).repeat_interleave(8),
        v.min().expand(32),
        v.cumsum(0),
    ]
    for row, want in zip(out, expected, strict=True):
        torch.testing.assert_close(row, want.int(), rtol=0, atol=0)


def test_two_masks_in_flight(build, seed):
    v = ints(32).long()
    out = torch.zeros(32, dtype=torch.int32)
    assert build.run("ok_two_masks", v.int(), out=out) is None
    lane = torch.arange(32)
    want = torch.zeros(32, dtype=torch.int64)
    for i in range(8):
        want += torch.where(lane < 16, 0 if i >= 4 else 1, 1) * (v[lane ^ (1 << i % 4)] + i)
    want += torch.where(lane % 2 == 1, v[1::2].max(), v[::2].sum())
    torch.testing.assert_close(out.long(), want, rtol=0, atol=0)


@pytest.mark.parametrize("num_threads", [32, 96, 1024])
def test_block_functions(build, num_threads):
    v = torch.randint(-50, 50, (3, num_threads)).float()
    scan = torch.zeros(3, num_threads, dtype=torch.int32)
    out = torch.zeros(3, 4)
    assert build.run("ok_block_functions", v, scan, out, num_threads) is None
    want = torch.stack([v.sum(1), v.amax(1), v.amin(1), v.sum(1)], 1)
    torch.testing.assert_close(out, want, rtol=0, atol=0)  # integers: exact in any order
    torch.testing.assert_close(scan, (v.cumsum(1) - v).int(), rtol=0, atol=0)


def test_barrier_votes(build, seed):
    v = ints(96, 6)
    out = torch.zeros(96, 4, dtype=torch.int32)
    assert build.run("ok_barrier_votes", v, out=out) is None
    want = torch.tensor([(v == 3).any(), (v == 3).all(), (v == 3).sum(), 1], dtype=torch.int32)
    torch.testing.assert_close(out, want.expand(96, 4), rtol=0, atol=0)


def test_named_barriers(build, seed):
    v = ints(64)
    out = torch.zeros(2, 64, dtype=torch.int32)
    assert build.run("ok_named_barriers", v, out=out) is None
    torch.testing.assert_close(out, torch.stack([v.flip(0), v.flip(0) + 1]), rtol=0, atol=0)


def test_atomics(build, seed):
    v = ints(500)
    out = torch.tensor([0, 0, 0, 0, -1, 0, 1000], dtype=torch.int32)
    assert build.run("ok_atomics", v, out=out, n=500) is None
    want = [5 * int((v % 4 == i).sum()) for i in range(4)]
    want += [int(v.max()), 5 * len((v % 64).unique()), int(v.min())]
    assert out.tolist() == want


def test_last_block(build, seed):
    v = torch.randint(-50, 50, (7 * 64,)).float()
    out = torch.zeros(9)
    assert build.run("ok_last_block", v, out=out) is None
    assert out[0] == v.sum()


@pytest.mark.parametrize("values", [whole, torch.randn])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma(build, dtype, values):
    a, b, c = values(16, 16).to(dtype), values(16, 8).to(dtype), values(16, 8)
    out = c.clone()
    name = "half" if dtype == torch.float16 else "bf16"
    assert build.run(f"ok_mma_{name}", a, b, out) is None
    assert_sums(build, out, c, a, b)


def cut(x):
    """Drop the 13 bits that tf32 does not have."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def rounded(x):
    return cut((x.view(torch.int32) + 0x1000).view(torch.float32))


@pytest.mark.parametrize("values", [whole, torch.randn])
def test_mma_tf32(build, values):
    a, b, c = values(16, 8), values(8, 8), values(16, 8)

    def run(mode):
        out = c.clone()
        assert build.run("ok_mma_tf32", a, b, out, mode) is None
        return out

    assert_sums(build, run(0), c, rounded(a), rounded(b))
    if build.kind != "cuda":  # what PTX leaves open; no kernel does it
        assert_sums(build, run(1), c, cut(a), cut(b))
    assert_sums(build, run(2), c, a, b, split=2.0**-21)
    if values is torch.randn:  # three products are float32 accuracy, one is not
        assert (run(0).double() - c.double() - a.double() @ b.double()).abs().max() > 1e-4


@pytest.mark.parametrize("values", [whole, torch.randn])
@pytest.mark.parametrize("mode", ["x2", "x4", "x2_trans", "x4_trans"])
def test_ldmatrix(build, mode, values):
    a, b, c = values(16, 16).half(), values(16, 16).half(), values(16, 16)
    out = c.clone()
    stored = b if mode.endswith("trans") else b.T.contiguous()  # [k][n], or [n][k]
    assert build.run("ok_ldmatrix", a, stored, out, ["x2", "x4", "x2_trans", "x4_trans"].index(mode)) is None
    assert_sums(build, out, c, a, b)


def test_mma_chain(build):
    a, b = whole(16, 16).half(), torch.randint(-1, 2, (16, 16)).half()  # |a b| < 2048: exact in half, too
    out = torch.zeros(16, 16)
    assert build.run("ok_mma_chain", a, b, out) is None
    torch.testing.assert_close(out, (a.float() @ b.float()) @ b.float(), rtol=0, atol=0)


@pytest.mark.parametrize("valid", [0, 1, 700, 1279, 1280])
def test_cp_async(build, seed, valid):
    v = torch.randn(1280)
    out = torch.zeros(1280)
    assert build.run("ok_async_ring", v, out=out, n=valid) is None
    first = torch.arange(1280)  # copies of 4, 2 and 1 floats, each all or nothing
    rank = first // 4 % 64
    size = torch.where(rank < 32, 4, torch.where(rank < 48, 2, 1))
    want = torch.where(first // size * size + size <= valid, v, 0)
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_shared_tail(build):
    v = torch.randn(77)
    out = torch.zeros(77)
    assert build.run("ok_tail", v, out=out, n=77) is None
    torch.testing.assert_close(out, v.flip(0), rtol=0, atol=0)


def test_launch(build):
    assert build.run("ok_empty_grid") is None
    out = torch.zeros(2, 2, 3, 2, 4, 4, dtype=torch.int32)
    assert build.run("ok_indices", out=out) is None
    axes = [torch.arange(s) * f for s, f in zip(out.shape, (1000000, 100000, 10000, 1000, 100, 1), strict=True)]
    want = sum(torch.meshgrid(*axes, indexing="ij"))
    torch.testing.assert_close(out, want.int(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["half", "float"])
def test_packs(build, dtype):
    v = torch.randn(512).to(getattr(torch, dtype))
    out = torch.zeros_like(v)
    assert build.run(f"ok_packs_{dtype}", v, out=out, n=512) is None
    torch.testing.assert_close(out, v + 1, rtol=0, atol=0)


def test_math(build):
    inf, nan, tiny = float("inf"), float("nan"), torch.finfo(torch.float32).tiny
    v = torch.cat(
        [torch.tensor([0.0, 1.0, 3.0, inf, -inf, nan, tiny / 2, -200.0, -126.5, 1.0 + 2**-11]), torch.randn(50)]
    )
    out = torch.zeros(4, 60)
    assert build.run("ok_math", v, out=out, n=60) is None
    exp = v.exp2()
    torch.testing.assert_close(out[0], torch.where(exp < tiny, 0, exp), rtol=1e-6, atol=0, equal_nan=True)
    flushed = torch.where(v.abs() < tiny, 0, v)
    torch.testing.assert_close(out[1], flushed.log2(), rtol=1e-6, atol=2**-22, equal_nan=True)  # as PTX promises
    assert out[2, 9] == 1.0 + 2**-10  # a tie goes away from zero
    assert (out[2].view(torch.int32)[~v.isnan()] & 0x1FFF == 0).all()
    finite = v.isfinite()
    torch.testing.assert_close(out[3][finite], v[finite], rtol=2**-21, atol=tiny)


def test_the_same_source_compiles_for_gpus(nvcc, tmp_path):
    """What the tests above run on a GPU compiles without one."""
    nvcc("80", tmp_path / "selftest.so")
    assert (tmp_path / "selftest.so").stat().st_size > 0
