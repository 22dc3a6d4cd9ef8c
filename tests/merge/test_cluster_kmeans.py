# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.merge.cluster_kmeans")
reference, floor = module.reference, module.floor

METRICS = ["l2", "cosine"]
STEP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # a rounding of a mean, with room


def test_floor_by_hand():
    x = torch.empty(2, 6272, 1152, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    moved = 2 * 6272 * 2304 + 2 * (
        32 * (2304 + 4) + 8 * 6272 + 4
    )  # tokens in; codes with counts, map and iterations out
    assert floor(x, 32, max_iter=0) == (moved, 2 * 2 * 6272 * 32 * 1152)
    assert floor(x, 32, max_iter=9) == (moved, 10 * 2 * 2 * 6272 * 32 * 1152)
    codes = torch.empty(2, 32, 1152, dtype=torch.bfloat16, device="meta")
    assert floor(x, 32, init=codes, max_iter=0)[0] == moved + 2 * 32 * 2304


def similarity(x, centroids, metric):
    """[tokens, centroids] in float64; NaN where one of the two is no number."""
    a, b = x.double().cpu(), centroids.double().cpu()
    if metric == "cosine":
        s = (a / a.norm(dim=-1, keepdim=True).clamp_min(1e-12)) @ (b / b.norm(dim=-1, keepdim=True).clamp_min(1e-12)).T
    else:
        s = -(a[:, None] - b).square().sum(-1)
    return s.masked_fill(~a.norm(dim=-1).isfinite()[:, None] | ~b.norm(dim=-1).isfinite(), torch.nan)


def check(x, num_clusters, *, exact=False, **options):
    """One call: its map by its own centroids; its last step, if it has converged, by its own map; counts."""
    out = tokred.cluster_kmeans(x, num_clusters, return_counts=True, **options)
    assert [t.dtype for t in out] == [x.dtype, torch.int64, torch.int32, torch.int32]
    centroids, dst_idx, num_members, num_iter = (t.cpu() for t in out)
    metric, drop_mask = options.get("metric", "l2"), options.get("drop_mask")
    for b in range(x.shape[0]):
        s = similarity(x[b], centroids[b], metric)
        if drop_mask is not None:
            s[drop_mask[b].cpu()] = torch.nan
        none = s.isnan().all(1)
        assert ((dst_idx[b] == -1) == none).all()
        size = x[b].double().cpu().square().sum(-1).nan_to_num(0, 0, 0).max() if x.shape[1] else 0.0
        off = 0.0 if exact else 4e-6 * (1.0 if metric == "cosine" else float(size))
        filled = s.masked_fill(s.isnan(), -torch.inf)
        mine = filled.gather(1, dst_idx[b].clamp_min(0)[:, None])[:, 0]
        assert (none | (mine >= filled.amax(1) - off)).all()
        if exact:
            lowest = (filled == filled.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
            assert (none | (dst_idx[b] == lowest)).all()
        assert num_members[b].tolist() == torch.bincount(dst_idx[b][~none], minlength=num_clusters).tolist()
        if 0 < num_iter[b] < options.get("max_iter", 20) and options.get("tol", 0.0) == 0.0:  # a fixed point
            for j in range(num_clusters):
                members = (dst_idx[b] == j).nonzero()[:, 0]
                if len(members) and x.shape[2] and options.get("update") != "medoid":
                    scale = float(x[b, members].float().abs().max())
                    mean = x[b, members].double().mean(0).cpu()
                    assert_close(centroids[b, j].double(), mean, rtol=0, atol=STEP[x.dtype] * scale)
                elif len(members):
                    assert (x[b, members] == out[0][b, j]).all(1).any()
    assert (num_iter <= options.get("max_iter", 20)).all()
    assert_close(list(tokred.cluster_kmeans(x, num_clusters, **options)), list(out[:2]), rtol=0, atol=0)
    return out


def grouped(batch_size, num_tokens, dim, groups, dtype, device):
    """Tokens in groups far apart: rounding decides nothing. Returns them and their groups."""
    centres = 8 * torch.randn(groups, dim)
    group = torch.randint(groups, (batch_size, num_tokens))
    return (centres[group] + 0.1 * torch.randn(batch_size, num_tokens, dim)).to(device, dtype), group


def planted(batch_size, num_tokens, dim, dtype, device):
    """Small whole numbers: every product and sum is exact, and many distances tie."""
    return torch.randint(-2, 3, (batch_size, num_tokens, dim)).to(device, dtype)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("init", ["kkz", "kmeans++"])
@pytest.mark.parametrize("update", ["mean", "medoid"])
def test_reference_step_by_step(device, metric, init, update, simt):
    """The same way as the definition in float64, for as many steps; groups keep rounding out of it."""
    x, _ = grouped(2, 70 if simt else 90, 24, 7, torch.float32, device)
    for max_iter in (0, 3) if simt else (0, 1, 3, 20):
        rules = {"metric": metric, "init": init, "update": update, "max_iter": max_iter, "seed": 11, "tol": 1e-3}
        actual = check(x, 7, **rules)
        assert_close(list(actual), list(reference(x, 7, return_counts=True, **rules)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_kkz_finds_groups(device, dtype, metric):
    """Groups far apart: one start in each, and so the groups themselves."""
    x, group = grouped(2, 80, 40, 6, dtype, device)
    _, dst_idx = check(x, 6, metric=metric, tol=0.1)[:2]
    for b in range(2):
        pairs = {(int(g), int(j)) for g, j in zip(group[b], dst_idx[b])}
        assert len(pairs) == len(set(group[b].tolist()))


# Around a vector, a warp, a panel, a tile of 64 tokens; centroids around a tile of 128.
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 31, 33, 64, 65, 129, 193, 300])
def test_sizes(device, num_tokens, simt, dtype):
    if simt and num_tokens > 66 and dtype != torch.bfloat16:
        return
    x = torch.randn(1 if simt else 2, num_tokens, 24).to(device, dtype)
    for i, num_clusters in enumerate({1, num_tokens // 3 + 1, num_tokens, num_tokens + 3}):
        if not simt or num_clusters < 40:
            check(x, num_clusters, max_iter=3, metric=METRICS[i % 2], update=("mean", "medoid")[i % 3 == 2])


@pytest.mark.parametrize("num_clusters", [127, 129, 300])
def test_many_codes(device, num_clusters, dtype, simt):
    """Vector quantisation: several panels and tiles of centroids."""
    if simt and num_clusters > 200 and dtype != torch.float32:
        return
    x = torch.randn(2, 70, 40).to(device, dtype)
    codes = torch.randn(2, num_clusters, 40).to(device, dtype)
    for metric in METRICS:
        centroids, _, _, num_iter = check(x, num_clusters, init=codes, max_iter=0, metric=metric)
        assert_close(centroids, codes, rtol=0, atol=0)
        assert (num_iter == 0).all()
    exact, codes = planted(1, 70, 4, dtype, device), planted(1, num_clusters, 4, dtype, device)
    check(exact, num_clusters, init=codes, max_iter=0, exact=True)


# One element, around a 16-byte load, a k step of 32 floats or 64 halves, several steps, longer than the pipeline.
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 16, 31, 33, 64, 72, 130, 320, 513])
def test_dims(device, dim, dtype):
    check(torch.randn(1, 50, dim).to(device, dtype), 5, max_iter=2)


def test_ties_go_to_the_lowest_index(device, dtype):
    x = torch.ones(1, 8, 4, device=device, dtype=dtype)
    for init in ("kkz", "kmeans++"):
        centroids, dst_idx, num_members, num_iter = check(x, 3, init=init, exact=True)
        assert (dst_idx == 0).all() and num_members.tolist() == [[8, 0, 0]] and num_iter.tolist() == [1]
        assert (centroids == 1).all()  # empty clusters keep their starts
    x = planted(2, 60, 2, dtype, device)
    check(x, 5, max_iter=0, exact=True)


def test_medoids_are_members_next_to_the_mean(device):
    """Of squared distances: the smallest sum to all members."""
    x = torch.randn(1, 60, 5, device=device)
    centroids, dst_idx = tokred.cluster_kmeans(x, 4, update="medoid")
    for j in range(4):
        members = x[0, dst_idx[0] == j].double()
        sums = (members[:, None] - members).square().sum((1, 2))
        assert_close(members[sums.argmin()].float(), centroids[0, j])


def test_empty_cluster_keeps_its_centroid(device):
    x = torch.randn(1, 30, 3, device=device)
    codes = torch.cat([x[:, :2], torch.full((1, 1, 3), 99.0, device=device)], 1)
    for update in ("mean", "medoid"):
        centroids, _, num_members, _ = check(x, 3, init=codes, update=update)
        assert (centroids[0, 2] == 99).all() and num_members[0, 2] == 0


def test_fewer_tokens_than_clusters(device):
    x = torch.randn(2, 5, 3, device=device)
    drop_mask = torch.tensor([[False, True, True, False, False], [True] * 5], device=device)
    for init in ("kkz", "kmeans++"):
        centroids, dst_idx, num_members, _ = check(x, 4, init=init, drop_mask=drop_mask)
        assert sorted(num_members[0].tolist()) == [0, 1, 1, 1] and num_members[1].tolist() == [0] * 4
        assert_close(centroids[0, 3], centroids[0, 0])
        assert (centroids[1] == 0).all() and (dst_idx[1] == -1).all()


@pytest.mark.parametrize("metric", METRICS)
def test_drop_mask_nan_inf(device, dtype, metric):
    """Tokens that take no part leave every bit as without them."""
    x = torch.randn(1, 90, 12).to(device, dtype)
    drop_mask = torch.rand(1, 90, device=device) < 0.3
    x[0, 3], x[0, 50, 2], x[0, 51, 2] = float("nan"), float("inf"), float("-inf")
    garbage = x.masked_fill(drop_mask[..., None], float("nan"))
    take_part = (~drop_mask[0] & x[0].isfinite().all(-1)).nonzero()[:, 0]
    alone = tokred.cluster_kmeans(x[:, take_part], 6, metric=metric, max_iter=4, return_counts=True)
    for tokens, mask in ((x, drop_mask), (garbage, drop_mask), (garbage, None)):
        out = check(tokens, 6, metric=metric, max_iter=4, drop_mask=mask)
        assert_close(out[1][:, take_part], alone[1])
        assert_close([out[0], out[2], out[3]], [alone[0], alone[2], alone[3]], rtol=0, atol=0)
        assert (out[1] == -1).sum() == 90 - len(take_part)
    codes = torch.randn(1, 4, 12).to(device, dtype)
    codes[0, 1, 0] = float("nan")
    assert not (tokred.cluster_kmeans(x, 4, init=codes, max_iter=2, metric=metric)[1] == 1).any()


def test_zero_vectors_have_cosine_zero(device):
    x = torch.zeros(1, 8, 4, device=device)
    x[0, :3, 0], x[0, 3:5, 0] = 1.0, -1.0
    codes = torch.tensor([[[-2.0, 0, 0, 0], [3.0, 0, 0, 0]]], device=device)
    dst_idx = check(x, 2, init=codes, max_iter=0, metric="cosine")[1]
    assert dst_idx.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]


def test_kmeanspp_draws_by_distance(device, simt):
    """A group nine times as likely as another is drawn as often; the first start is drawn evenly."""
    x = torch.tensor([0.0] * 8 + [1.0, 3.0], device=device).reshape(1, 10, 1)
    first, second = torch.zeros(10), torch.zeros(2)
    draws = 60 if simt else 600
    for seed in range(draws):
        centroids = tokred.cluster_kmeans(x, 2, init="kmeans++", max_iter=0, seed=seed)[0][0, :, 0].tolist()
        first[int(centroids[0])] += 1
        if centroids[0] == 0:
            second[int(centroids[1] == 3)] += 1
    assert 0.65 < first[0] / draws < 0.95
    assert 0.75 < second[1] / second.sum() < 1.0
    x = torch.randn(3, 40, 4, device=device)
    same = x[:1].expand(3, -1, -1)
    out = tokred.cluster_kmeans(same, 6, init="kmeans++", max_iter=0, seed=-4)[0]
    assert_close(out[0], out[2], rtol=0, atol=0)


def test_converged_rows_stay(device):
    """A row's result does not depend on how long its neighbours need, nor on the iterations left."""
    x, _ = grouped(4, 64, 6, 5, torch.float32, device)
    x[0] = 1.0  # converges at once: its mean, 64 shares of 1 / 64, is exact
    out = check(x, 5, max_iter=15)
    assert out[3][0] == 1 and out[3].max() < 15
    longer = tokred.cluster_kmeans(x, 5, max_iter=30, return_counts=True)
    assert_close(list(out), list(longer), rtol=0, atol=0)
    stopped = tokred.cluster_kmeans(x, 5, max_iter=15, tol=1e9, return_counts=True)
    assert (stopped[3] == 1).all()


@pytest.mark.parametrize("shape", [(3, 130, 24), (3, 400, 64)])
def test_row_is_independent_of_its_batch(device, threads, dtype, shape, simt):
    if simt and (shape[1] > 300 or dtype != torch.float32):
        return
    x = torch.randn(*shape).to(device, dtype)

    def run(rows):
        return [
            t
            for init in ("kkz", "kmeans++")
            for update in ("mean", "medoid")
            for t in tokred.cluster_kmeans(rows, 6, init=init, update=update, max_iter=2, return_counts=True)
        ]

    alone = [torch.cat(rows) for rows in zip(*(run(x[b : b + 1]) for b in range(shape[0])))]
    for result in threads(lambda: run(x)):
        assert_close(result, alone, rtol=0, atol=0)


def test_views(device, dtype):
    base = torch.randn(2, 60, 60).to(device, dtype)
    for view in (
        base[:, :, 1:34],  # misaligned
        base[:1, :, :32],
        base[:, 1::3],
        base.transpose(0, 1).contiguous().transpose(0, 1)[:, :40],
        base[:1, :30].expand(3, 30, 60),
    ):
        check(view, 5, max_iter=2)


def test_offsets_beyond_2_31(device):
    base = torch.empty(2**32, dtype=torch.float16, device=device)
    x = base.as_strided((3, 5, 8), (700, 2**30 - 707, 1))
    x.copy_(torch.randn(3, 5, 8))
    check(x, 2)
    x = base.as_strided((2, 33, 8), (2**31 + 8, 16, 1))
    x.copy_(torch.randn(2, 33, 8))
    check(x, 4, update="medoid")


@given(st.data())
def test_any_call(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_tokens = data.draw(st.integers(0, 70))
    batch_size, dim = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = planted(batch_size, num_tokens, dim, torch.float32, device)
    drop_mask = torch.rand(batch_size, num_tokens, device=device) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    check(
        x,
        data.draw(st.integers(1, 20)),
        init=data.draw(st.sampled_from(["kkz", "kmeans++"])),
        update=data.draw(st.sampled_from(["mean", "medoid"])),
        max_iter=data.draw(st.integers(0, 3)),
        drop_mask=data.draw(st.sampled_from([None, drop_mask])),
        seed=data.draw(st.integers(-9, 9)),
    )


def test_empty(device):
    for shape in ((0, 7, 4), (2, 0, 4), (0, 0, 0), (2, 7, 0)):
        for init in ("kkz", "kmeans++"):
            out = check(torch.randn(*shape, device=device), 2, init=init, max_iter=2)
            assert out[0].shape == (shape[0], 2, shape[2]) and (out[0] == 0).all()


def test_merges_by_its_map(device):
    x = torch.randn(2, 65, 16, device=device)
    centroids, dst_idx, num_members, _ = tokred.cluster_kmeans(x, 8, max_iter=100, return_counts=True)
    merged, size = tokred.segment_merge(x, dst_idx, 8)
    assert size.tolist() == num_members.float().tolist()
    assert_close(merged, centroids, rtol=0, atol=0)  # converged: the very means


def test_backward_raises(device):
    x = torch.randn(2, 9, 4, device=device, requires_grad=True)
    centroids, dst_idx = tokred.cluster_kmeans(x, 2)
    assert not dst_idx.requires_grad
    with pytest.raises(RuntimeError, match="cluster_kmeans: has no gradient; merge by its dst_idx with segment_merge"):
        centroids.sum().backward()


def test_vmap(device):
    x = torch.randn(2, 11, 3, 4, device=device)
    codes = torch.randn(3, 2, 3, 4, device=device)
    drop_mask = torch.rand(3, 2, 11, device=device) < 0.2

    def run(x, codes, drop_mask):
        return tokred.cluster_kmeans(x, 3, init=codes, drop_mask=drop_mask, max_iter=2, return_counts=True)

    mapped = torch.vmap(run, in_dims=(2, 0, 0))(x, codes, drop_mask)
    for i in range(3):
        alone = run(x[:, :, i].contiguous(), codes[i], drop_mask[i])
        assert_close([m[i] for m in mapped], list(alone), rtol=0, atol=0)


def test_autocast_leaves_x_alone(device):
    x = torch.randn(2, 50, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = tokred.cluster_kmeans(x, 5)
    assert_close(list(inside), list(tokred.cluster_kmeans(x, 5)), rtol=0, atol=0)


ERRORS = {
    "expected num_clusters >= 1, got 0": lambda x: tokred.cluster_kmeans(x, 0),
    "expected max_iter >= 0, got -1": lambda x: tokred.cluster_kmeans(x, 2, max_iter=-1),
    "expected tol >= 0, got -1": lambda x: tokred.cluster_kmeans(x, 2, tol=-1.0),
    "expected x of shape [batch_size, num_tokens, dim], got [7, 4]": lambda x: tokred.cluster_kmeans(x[0], 1),
    "expected x of dtype float32, float16 or bfloat16, got float64": lambda x: tokred.cluster_kmeans(x.double(), 1),
    "expected x contiguous in its last dimension, got strides [28, 1, 7]": (
        lambda x: tokred.cluster_kmeans(x.transpose(1, 2).contiguous().transpose(1, 2), 1)
    ),
    'expected init "kkz", "kmeans++" or a tensor, got "random"': lambda x: tokred.cluster_kmeans(x, 1, init="random"),
    'expected metric "l2" or "cosine", got "dot"': lambda x: tokred.cluster_kmeans(x, 1, metric="dot"),
    'expected update "mean" or "medoid", got "median"': lambda x: tokred.cluster_kmeans(x, 1, update="median"),
    "expected init of the dtype of x, float32, got float16": lambda x: tokred.cluster_kmeans(
        x, 2, init=x[:, :2].half()
    ),
    "expected init of shape [batch_size, num_clusters, dim] = [2, 3, 4], got [2, 2, 4]": (
        lambda x: tokred.cluster_kmeans(x, 3, init=x[:, :2].contiguous())
    ),
    "expected init contiguous, got strides [28, 4, 1]": lambda x: tokred.cluster_kmeans(x, 2, init=x[:, :2]),
    "expected drop_mask of dtype bool, got float32": lambda x: tokred.cluster_kmeans(
        x, 1, drop_mask=x[:, :, 0].contiguous()
    ),
    "expected drop_mask of shape [batch_size, num_tokens] = [2, 7], got [2, 4]": (
        lambda x: tokred.cluster_kmeans(x, 1, drop_mask=x[:, :4, 0].contiguous() > 0)
    ),
    "expected drop_mask contiguous, got strides [0, 1]": (
        lambda x: tokred.cluster_kmeans(x, 1, drop_mask=(x[:1, :, 0] > 0).expand(2, 7))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.randn(2, 7, 4, device=device))
    assert f"cluster_kmeans: {message}" in str(caught.value)
