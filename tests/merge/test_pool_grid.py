# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.testing import assert_close

POOLS = {
    ("mean", 1): F.adaptive_avg_pool1d,
    ("mean", 2): F.adaptive_avg_pool2d,
    ("mean", 3): F.adaptive_avg_pool3d,
    ("max", 1): F.adaptive_max_pool1d,
    ("max", 2): F.adaptive_max_pool2d,
    ("max", 3): F.adaptive_max_pool3d,
}


def torch_pool(x, grid, out_grid, mode):
    """One item in float64 by torch: [tokens, dim] to [cells, dim]."""
    image = x.double().T.reshape(1, x.shape[1], *grid)
    return POOLS[mode, len(grid)](image, tuple(out_grid))[0].flatten(1).T


GRIDS = [
    ([[7], [12], [3]], (3,)),
    ([[6, 6], [5, 9], [3, 4], [13, 4]], (3, 4)),
    ([[27, 27], [16, 19]], (14, 14)),
    ([[4, 6, 6], [9, 5, 7], [2, 3, 3]], (2, 3, 3)),
    ([[5, 7, 3]], (5, 1, 2)),
]


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize(("grids", "out_grid"), GRIDS)
def test_equals_torch_item_by_item(device, dtype, grids, out_grid, mode):
    """Packed and padded; what is behind a grid is NaN."""
    lens = [int(torch.tensor(grid).prod()) for grid in grids]
    items = [torch.randn(n, 5).to(dtype) for n in lens]
    places = [torch.randint(0, 50, (n, 3)) for n in lens]
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0).int().to(device)
    given = torch.tensor(grids).to(device)
    x, positions = torch.cat(items).to(device), torch.cat(places).to(device)
    packed, moved = tokred.pool_grid(x, given, out_grid, mode=mode, positions=positions, cu_seqlens=cu_seqlens)
    assert packed.dtype == dtype and moved.dtype == torch.float32
    assert_close(tokred.pool_grid(x, given, out_grid, mode=mode, cu_seqlens=cu_seqlens), packed, rtol=0, atol=0)
    padded = torch.full((len(items), max(lens) + 2, 5), float("nan")).to(dtype)
    for b, item in enumerate(items):
        padded[b, : lens[b]] = item
        assert_close(
            packed[b].cpu(), torch_pool(item, grids[b], out_grid, mode), atol=4e-3 if dtype != torch.float32 else 1e-6
        )
        assert_close(moved[b].cpu(), torch_pool(places[b], grids[b], out_grid, mode), rtol=1e-6, atol=1e-5)
    dense = tokred.pool_grid(padded.to(device), given.int(), out_grid, mode=mode)
    assert_close(dense, packed, rtol=0, atol=0)


def test_sum_counts_each_token_where_it_falls(device):
    ones = torch.ones(1, 49, 1, device=device)
    grids = torch.tensor([[7, 7]], device=device)
    counts = tokred.pool_grid(ones, grids, (3, 3), mode="sum")[0, :, 0].reshape(3, 3)
    assert_close(counts, torch.full((3, 3), 9.0))  # of 7 rows: 0 to 2, 2 to 4, 4 to 6


def test_grids_that_do_not_fit(device):
    """More cells than tokens: what is not there is left out. No cells at all, negative ones: nothing."""
    x = torch.randn(3, 6, 4, device=device)
    grids = torch.tensor([[4, 2], [0, 3], [-2, -3]], device=device)
    pooled = tokred.pool_grid(x, grids, (2, 2), mode="sum")
    assert_close(pooled[0, 2:], x[0, 4:6], rtol=0, atol=0)
    assert pooled[1:].abs().sum() == 0
    short = tokred.pool_grid(x[:1], torch.tensor([[1, 6]], device=device), (2, 3))
    assert short.isfinite().all()


def test_gradients(device):
    x = torch.randn(1, 35, 3, device=device, requires_grad=True)
    seed = torch.randn(1, 6, 3, device=device)
    (tokred.pool_grid(x, torch.tensor([[5, 7]], device=device), (2, 3)) * seed).sum().backward()
    wide = x.detach().double().cpu().requires_grad_()
    (torch_pool(wide[0], (5, 7), (2, 3), "mean") * seed[0].double().cpu()).sum().backward()
    assert_close(x.grad.cpu(), wide.grad, rtol=1e-5, atol=1e-6)


def test_compiled(device):
    x, grids = torch.randn(2, 12, 4, device=device), torch.tensor([[3, 4], [2, 6]], device=device)
    cu_seqlens = torch.tensor([0, 12, 24], dtype=torch.int32, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(tokred.pool_grid, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, grids, (2, 2)), tokred.pool_grid(x, grids, (2, 2)))
    packed = (x.flatten(0, 1), grids, (2, 2))
    assert_close(compiled(*packed, cu_seqlens=cu_seqlens), tokred.pool_grid(*packed, cu_seqlens=cu_seqlens))


def test_errors():
    x, grids = torch.zeros(2, 6, 4), torch.ones(2, 2).long()
    for message, args, options in (
        (r"x of shape \[batch_size, num_tokens, dim\], got \[6, 4\]", (x[0], grids, (1, 1)), {}),
        (
            r"x of shape \[total_tokens, dim\], got \[2, 6, 4\]",
            (x, grids, (1, 1)),
            {"cu_seqlens": torch.zeros(3).int()},
        ),
        (r"out_grid of 1 to 3 axes of at least 1, got \(2, 0\)", (x, grids, (2, 0)), {}),
        (r"integer grids of shape .* = \[2, 3\], got int64 \[2, 2\]", (x, grids, (1, 1, 1)), {}),
        (
            r"positions of shape \[2, 6, 'num_axes'\], got \[2, 5, 3\]",
            (x, grids, (1, 1)),
            {"positions": torch.zeros(2, 5, 3)},
        ),
    ):
        with pytest.raises(RuntimeError, match="pool_grid: expected " + message):
            tokred.pool_grid(*args, **options)
