# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokred
from tokred.testing import assert_close

module = importlib.import_module("tokred.merge.cluster_dpc_knn")
reference, floor = module.reference, module.floor

ORDERS = ["index", "score"]


def test_floor_by_hand():
    x = torch.empty(4, 3136, 64, dtype=torch.bfloat16, device="meta")  # floors look at shapes and dtypes alone
    read, written = (
        4 * 3136 * 128,
        4 * 784 * 8 + 4 * 4 + 4 * 3136 * 16,
    )  # tokens in; centres, counts, three per token out
    assert floor(x, 784) == (read + written, 2 * 4 * 3136 * (3136 + 784) * 64)
    drop_mask = torch.empty(4, 3136, dtype=torch.bool, device="meta")
    assert floor(x, 784, k=3, drop_mask=drop_mask) == (
        read + written + 4 * 3136,
        2 * 4 * 3136 * (3136 + 784) * 64,
    )


def distances(x):
    """[n, n] squared, in float64; NaN where a token is no number."""
    v = x.double().cpu()
    d = (v[:, None] - v).square().sum(-1)
    bad = ~v.square().sum(-1).isfinite()
    return d.masked_fill(bad | bad[:, None], torch.nan)


def ranked(score, among):
    """Tokens by falling score, NaN last, ties by index."""
    key = {i: (score[i] != score[i], -score[i] if score[i] == score[i] else 0.0, i) for i in among}
    return sorted(among, key=key.get)


def check_row(x, num_clusters, centres, dst_idx, score, log_density, *, k=5, drop=None, order="index", exact=False):
    """One sequence: densities by their formula, everything else by the rules from what the op itself returned before it."""
    n, dim = x.shape
    d = distances(x)
    size = x.double().cpu().square().sum(-1).nan_to_num(0, 0, 0).clamp_max(1e30)
    off = 0.0 if exact or n == 0 else float(4e-6 * size.max())  # of a squared distance
    keep = [i for i in range(n) if drop is None or not drop[i]]
    good = [i for i in keep if d[i, i] == 0]
    for i in set(range(n)) - set(keep):
        assert score[i] == log_density[i] == -torch.inf and dst_idx[i] == -1
    for i in set(keep) - set(good):
        assert score[i] != score[i] and log_density[i] != log_density[i]
    if good:
        near = d[good][:, good].sort(1).values
        expected = -near[:, :k].mean(1) / max(dim, 1)
        assert_close(torch.tensor(log_density, dtype=torch.float64)[good], expected, rtol=2e-6, atol=off / max(dim, 1))
        by_density = ranked(log_density, good)
        for at, i in enumerate(by_density):
            delta = near.max() if at == 0 else d[i, by_density[:at]].min()
            low, high = (0.5 * torch.log((delta + o).clamp_min(0) / max(dim, 1)) for o in (-off, off))
            found = score[i] - log_density[i]  # -inf where the distance is 0
            slack = 1e-6 * (abs(log_density[i]) + high.abs().nan_to_num(0, 0, 0) + 1)
            assert low - slack <= found <= high + slack
    expected = ranked(score, keep)[:num_clusters]
    expected = expected if order == "score" else sorted(expected)
    assert centres == expected + [-1] * (num_clusters - len(expected))
    for i in keep:
        if i in expected:
            assert expected[dst_idx[i]] == i
        elif i not in good or not any(c in good for c in expected):
            assert expected[dst_idx[i]] == min(expected) if expected else dst_idx[i] == -1
        else:
            to = {c: float(d[i, c]) for c in expected if c in good}
            chosen = expected[dst_idx[i]]
            assert to[chosen] <= min(to.values()) + off
            if exact:
                assert chosen == min(c for c in to if to[c] == min(to.values()))


def check(x, num_clusters, *, exact=False, **options):
    out = tokred.cluster_dpc_knn(x, num_clusters, return_num_centres=True, return_score=True, **options)
    centre_idx, dst_idx, num_centres, score, log_density = (t.cpu().tolist() for t in out)
    assert [t.dtype for t in out] == [torch.int64, torch.int64, torch.int32, torch.float32, torch.float32]
    drop_mask = options.get("drop_mask")
    for b in range(x.shape[0]):
        drop = None if drop_mask is None else drop_mask[b].tolist()
        rules = {"k": options.get("k", 5), "order": options.get("order", "index"), "drop": drop, "exact": exact}
        check_row(x[b], num_clusters, centre_idx[b], dst_idx[b], score[b], log_density[b], **rules)
        assert num_centres[b] == sum(c >= 0 for c in centre_idx[b])
    plain = tokred.cluster_dpc_knn(x, num_clusters, **options)
    assert_close(list(plain), list(out[:2]))
    return out


def planted(batch_size, num_tokens, dim, dtype, device):
    """Small whole numbers: every product and sum is exact, and many distances tie."""
    return torch.randint(-2, 3, (batch_size, num_tokens, dim)).to(device, dtype)


def published(x, num_clusters, k):
    """The steps of TCFormer's released code, one image, in float64; without its random numbers."""
    d = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    rho = (-d.topk(k, largest=False).values.square().mean(1)).exp()
    delta = torch.where(rho[None] > rho[:, None], d, d.max()).amin(1)
    centres = (rho * delta).topk(num_clusters).indices
    cluster = d[:, centres].argmin(1)
    cluster[centres] = torch.arange(num_clusters)
    return centres, cluster


@pytest.mark.parametrize("num_tokens", [9, 50, 197])
def test_published_steps(device, num_tokens, simt):
    x = torch.randn(1 if simt else 3, num_tokens, 48)
    for k in (1, 5, 7):
        centre_idx, dst_idx = tokred.cluster_dpc_knn(x.to(device), num_tokens // 4, k=k, order="score")
        for row, centres, clusters in zip(x, centre_idx.cpu(), dst_idx.cpu()):
            if k == 1:  # every density is 1: the released code leaves the choice to its random numbers
                assert centres[0] == 0
            else:
                assert_close([centres, clusters], list(published(row, num_tokens // 4, k)))


# Around a vector, a warp, a panel, a tile of 64 rows or 128 columns, a CPU task; then an image.
SIZES = [1, 2, 3, 5, 16, 31, 33, 64, 65, 127, 129, 193, 257, 400]


@pytest.mark.parametrize("num_tokens", SIZES)
def test_sizes(device, num_tokens, simt, dtype):
    if simt and num_tokens > 130 and dtype != torch.bfloat16:
        return
    x = torch.randn(1 if simt else 2, num_tokens, 24).to(device, dtype)
    for i, num_clusters in enumerate({0, 1, num_tokens // 3, num_tokens}):
        if not simt or num_tokens < 70 or i == 2:
            check(x, num_clusters, k=(3, 5, 16, 9)[i], order=ORDERS[i % 2])


# One element, around a 16-byte load, a k step of 32 floats or 64 halves, several steps, longer than the pipeline.
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 16, 31, 33, 64, 72, 130, 320, 513])
def test_dims(device, dim, dtype):
    check(torch.randn(1, 70, dim).to(device, dtype), 20)


@pytest.mark.parametrize("num_tokens", [5, 70, 300])
def test_exact_ties(device, num_tokens, dtype, simt):
    if simt and num_tokens > 70 and dtype != torch.float32:
        return
    x = planted(1 if simt else 2, num_tokens, 3, dtype, device)
    for order in ORDERS:
        check(x, num_tokens // 4, order=order, k=4, exact=True)
    same = torch.full((1, num_tokens, 40), 0.3, device=device, dtype=dtype)
    centre_idx, dst_idx = check(same, num_tokens // 2, exact=True)[:2]
    assert centre_idx[0].tolist() == list(range(num_tokens // 2))
    assert (dst_idx[0, num_tokens // 2 :] == 0).all()


@pytest.mark.parametrize("dim", [40, 768])
def test_equal_tokens_have_distance_zero(device, dim, dtype, simt):
    """Repeated video frames: products of equal rows are equal in every bit, so their distance is 0 and not rounding."""
    frame = 100 * torch.randn(1, 33, dim)
    x = frame.repeat(1, 2 if simt else 5, 1).to(device, dtype)
    score, log_density = tokred.cluster_dpc_knn(x, 33, k=2, return_score=True)[2:]
    assert (log_density == 0).all()
    assert (score[0, 33:] == -torch.inf).all()  # equal density, ties by index: the first copy of each is denser
    assert score[0, :33].isfinite().all()
    assert not torch.signbit(log_density).any()


def test_densities_that_underflow(device):
    """exp(-500) is 0 in float32; the order by its logarithm is not lost."""
    x = torch.randn(1, 60, 16, device=device) * torch.linspace(20, 60, 60, device=device)[:, None]
    _, _, score, log_density = tokred.cluster_dpc_knn(x, 9, return_score=True)
    assert log_density.max() < -105 and len(set(score[0].tolist())) == 60
    check(x, 9)


@pytest.mark.parametrize("num_tokens", [9, 140])
def test_drop_mask(device, num_tokens, dtype, simt):
    if simt and num_tokens > 100 and dtype != torch.float16:
        return
    x = planted(4, num_tokens, 3, dtype, device)
    drop_mask = torch.rand(4, num_tokens) < 0.4
    drop_mask[0] = True
    drop_mask[1, 1:] = True
    drop_mask[2] = False
    drop_mask = drop_mask.to(device)
    for order in ORDERS:
        out = check(x, num_tokens // 2, drop_mask=drop_mask, order=order, exact=True)
    garbage = x.masked_fill(drop_mask[..., None], float("nan"))
    rules = {"drop_mask": drop_mask, "order": "score", "return_num_centres": True, "return_score": True}
    assert_close(list(tokred.cluster_dpc_knn(garbage, num_tokens // 2, **rules)), list(out), rtol=0, atol=0)


@pytest.mark.parametrize("num_tokens", [6, 151])
def test_nan_inf(device, num_tokens, dtype, simt):
    if simt and num_tokens > 100 and dtype != torch.float32:
        return
    x = planted(3, num_tokens, 4, dtype, device)
    x[0, 2] = float("nan")
    x[0, 4, 1] = float("inf")
    x[1] = float("nan")
    x[2, :-1, 0] = float("-inf")
    for order in ORDERS:
        for num_clusters in (
            (num_tokens // 3, num_tokens - 1) if simt else (1, num_tokens // 3, num_tokens - 1, num_tokens)
        ):
            check(x, num_clusters, order=order, exact=True)
    good = [i for i in range(num_tokens) if i not in (2, 4)]
    centre_idx, dst_idx, score, _ = tokred.cluster_dpc_knn(x[:1], 2, return_score=True)
    alone = tokred.cluster_dpc_knn(x[:1, good], 2, return_score=True)
    assert [good[c] for c in alone[0][0].tolist()] == centre_idx[0].tolist()
    assert_close([dst_idx[:, good], score[:, good]], [alone[1], alone[2]], rtol=0, atol=0)


def test_noise(device):
    """A function of seed and position alone; as a share of the density."""
    x = torch.ones(2, 40, 8, device=device)
    out = [tokred.cluster_dpc_knn(x, 9, noise=0.5, seed=s, return_score=True) for s in (3, 3, 4)]
    assert_close(list(out[0]), list(out[1]), rtol=0, atol=0)
    rho = (out[0][3].exp() - 1) / 0.5
    assert_close(rho[0], rho[1], rtol=0, atol=0)
    assert ((rho >= -1e-6) & (rho < 1)).all() and rho[0].std() > 0.2 and not torch.equal(out[0][3], out[2][3])
    x = planted(2, 40, 3, torch.float32, device)
    rules = {"noise": 0.1, "seed": -5, "return_score": True}
    assert_close(list(tokred.cluster_dpc_knn(x, 9, **rules)), list(reference(x, 9, **rules)), rtol=1e-5, atol=1e-5)


def test_packed(device, simt):
    lengths = [0, 33, 1, 0, 140, 5]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    x = torch.randn(sum(lengths), 24, device=device)
    drop_mask = torch.rand(len(x), device=device) < 0.2
    for max_seqlen in (None, 140, 150):
        for order in ORDERS[: 1 if simt else 2]:
            rules = {"order": order, "k": 3, "return_score": True}
            out = tokred.cluster_dpc_knn(
                x, 11, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, drop_mask=drop_mask, **rules
            )
            for b, length in enumerate(lengths):
                part = slice(int(cu_seqlens[b]), int(cu_seqlens[b]) + length)
                alone = tokred.cluster_dpc_knn(
                    x[None, part],
                    min(11, length),
                    drop_mask=drop_mask[None, part],
                    return_num_centres=True,
                    **rules,
                )
                assert_close(out[0][b, : min(11, length)], alone[0][0], rtol=0, atol=0)
                assert (out[0][b, min(11, length) :] == -1).all() and out[2][b] == alone[2][0]
                for i in (1, 3, 4):
                    assert_close(out[i][part], alone[i][0], rtol=0, atol=0)


def test_packed_tokens_that_are_not_looked_at(device):
    cu_seqlens = torch.tensor([0, 20, 50], dtype=torch.int32, device=device)
    x = torch.randn(50, 8, device=device)
    for most in (0, 7, 25):
        rules = {"cu_seqlens": cu_seqlens, "max_seqlen": most, "return_score": True}
        _, dst_idx, num_centres, score, log_density = tokred.cluster_dpc_knn(x, 5, **rules)
        seen = torch.cat([torch.arange(n, device=device) < most for n in (20, 30)])
        assert ((dst_idx >= 0) == seen).all()
        assert (score[~seen] == -torch.inf).all() and (log_density[~seen] == -torch.inf).all()
        assert num_centres.tolist() == [min(5, most)] * 2
        assert_close(dst_idx, reference(x, 5, **rules)[1])


def test_packed_bad_offsets_stay_inside(device):
    x = torch.randn(12, 8, device=device)
    for offsets in ([-5, 3, 12], [0, 40, 12], [12, 12, 0]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
        centre_idx, dst_idx, _ = tokred.cluster_dpc_knn(x, 3, cu_seqlens=cu_seqlens, max_seqlen=12)
        assert centre_idx.max() < 12 and dst_idx.max() < 3


def test_merges_by_its_map(device):
    """Sizes of merged tokens sum to the tokens; with as many clusters as tokens everything stays."""
    x = torch.randn(2, 65, 16, device=device)
    _, dst_idx = tokred.cluster_dpc_knn(x, 16)
    merged, size = tokred.segment_merge(x, dst_idx, 16)
    assert size.sum(1).tolist() == [65, 65] and (size >= 1).all()
    assert_close((merged * size[..., None]).sum(1), x.sum(1), rtol=1e-4, atol=1e-4)
    assert_close(tokred.cluster_dpc_knn(x, 65)[1], torch.arange(65, device=device).expand(2, -1))


def test_views(device, dtype):
    base = torch.randn(2, 80, 60).to(device, dtype)
    for view in (
        base[:, :, 1:34],  # misaligned
        base[:1, :, :32],
        base[:, 1::3],
        base.transpose(0, 1).contiguous().transpose(0, 1)[:, :40],
        base[:1, :30].expand(3, 30, 60),
        base[:1, :1].expand(1, 50, 60),
    ):
        check(view, 9)


def test_offsets_beyond_2_31(device):
    base = torch.empty(2**32, dtype=torch.float16, device=device)
    x = base.as_strided((3, 5, 8), (700, 2**30 - 707, 1))
    x.copy_(torch.randn(3, 5, 8))
    check(x, 2)
    x = base.as_strided((2, 33, 8), (2**31 + 8, 16, 1))
    x.copy_(torch.randn(2, 33, 8))
    check(x, 9)


@given(st.data())
def test_any_call(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_tokens = data.draw(st.integers(0, 80))
    batch_size, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = planted(batch_size, num_tokens, dim, torch.float32, device)
    drop_mask = torch.rand(batch_size, num_tokens, device=device) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    check(
        x,
        data.draw(st.integers(0, num_tokens)),
        k=data.draw(st.integers(1, 16)),
        drop_mask=data.draw(st.sampled_from([None, drop_mask])),
        order=data.draw(st.sampled_from(ORDERS)),
        exact=True,
    )


@pytest.mark.parametrize("shape", [(4, 130, 24), (3, 600, 64)])
def test_row_is_independent_of_its_batch(device, threads, dtype, shape, simt):
    if simt and (shape[1] > 300 or dtype != torch.float32):
        return
    x = torch.randn(*shape).to(device, dtype)

    def run(rows):
        return list(tokred.cluster_dpc_knn(rows, 20, order="score", return_score=True))

    alone = [torch.cat(rows) for rows in zip(*(run(x[b : b + 1]) for b in range(shape[0])))]
    for result in threads(lambda: run(x)):
        assert_close(result, alone, rtol=0, atol=0)


def test_first_tokens_do_not_depend_on_the_rest_of_a_tile(device):
    """Dropped tokens at any place leave every bit as without them."""
    x = torch.randn(1, 150, 40, device=device)
    drop_mask = torch.rand(1, 150, device=device) < 0.3
    left = (~drop_mask[0]).nonzero()[:, 0]
    rules = {"return_score": True, "order": "score"}
    with_mask = tokred.cluster_dpc_knn(x, 20, drop_mask=drop_mask, **rules)
    without = tokred.cluster_dpc_knn(x[:, left], 20, **rules)
    assert_close(left[without[0]], with_mask[0])
    assert_close([t[:, left] for t in with_mask[1:]], list(without[1:]), rtol=0, atol=0)


def test_empty(device):
    for shape in ((0, 7, 4), (2, 0, 4), (0, 0, 0)):
        check(torch.randn(*shape, device=device), 0)
    check(torch.randn(2, 7, 0, device=device), 3, exact=True)  # all distances are 0
    out = tokred.cluster_dpc_knn(
        torch.randn(0, 4, device=device), 3, cu_seqlens=torch.zeros(3, dtype=torch.int32, device=device)
    )
    assert out[0].tolist() == [[-1] * 3] * 2 and out[1].shape == (0,) and out[2].tolist() == [0, 0]


@pytest.mark.parametrize("num_tokens", [1030, 2500])
def test_long(device, num_tokens, simt):
    """Several splits; more tokens than a block numbers or ranks at once."""
    if simt and num_tokens > 2000:
        return
    x = planted(1, num_tokens, 2, torch.bfloat16, device)
    rules = {"return_score": True, "order": "score"}
    actual, expected = (f(x, num_tokens // 5, **rules) for f in (tokred.cluster_dpc_knn, reference))
    assert_close(list(actual), list(expected), rtol=1e-6, atol=1e-6)


def test_backward_raises(device):
    x = torch.randn(2, 9, 4, device=device, requires_grad=True)
    centre_idx, dst_idx, score, _ = tokred.cluster_dpc_knn(x, 2, return_score=True)
    assert not centre_idx.requires_grad and not dst_idx.requires_grad
    with pytest.raises(RuntimeError, match="cluster_dpc_knn: has no gradient; merge by its dst_idx with segment_merge"):
        score.sum().backward()


def test_vmap(device):
    x = torch.randn(2, 11, 3, 4, device=device)
    drop_mask = torch.rand(3, 2, 11, device=device) < 0.2

    def run(x, drop_mask):
        return tokred.cluster_dpc_knn(x, 3, drop_mask=drop_mask, return_score=True)

    mapped = torch.vmap(run, in_dims=(2, 0))(x, drop_mask)
    for i in range(3):
        alone = run(x[:, :, i].contiguous(), drop_mask[i])
        assert_close([m[i] for m in mapped], list(alone), rtol=0, atol=0)


def test_autocast_leaves_x_alone(device):
    x = torch.randn(2, 50, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = tokred.cluster_dpc_knn(x, 9, return_score=True)
    assert_close(list(inside), list(tokred.cluster_dpc_knn(x, 9, return_score=True)), rtol=0, atol=0)


def packed_call(x, num_clusters=2, cu=(0, 7), **options):
    return tokred.cluster_dpc_knn(
        x[0], num_clusters, cu_seqlens=torch.tensor(cu, dtype=torch.int32, device=x.device), **options
    )


ERRORS = {
    "expected num_clusters in [0, 7], got 8": lambda x: tokred.cluster_dpc_knn(x, 8),
    "expected num_clusters in [0, 7], got -1": lambda x: tokred.cluster_dpc_knn(x, -1),
    "expected num_clusters >= 0, got -1": lambda x: packed_call(x, -1),
    "expected k in [1, 16], got 0": lambda x: tokred.cluster_dpc_knn(x, 2, k=0),
    "expected k in [1, 16], got 17": lambda x: tokred.cluster_dpc_knn(x, 2, k=17),
    "expected noise >= 0, got -1": lambda x: tokred.cluster_dpc_knn(x, 2, noise=-1.0),
    "expected max_seqlen in [0, 7], got 8": lambda x: packed_call(x, max_seqlen=8),
    "expected x of shape [batch_size, num_tokens, dim], got [7, 4]": lambda x: tokred.cluster_dpc_knn(x[0], 1),
    "expected x of shape [total_tokens, dim] (with cu_seqlens), got [1, 2, 7, 4]": lambda x: packed_call(x[None, None]),
    "expected x of dtype float32, float16 or bfloat16, got float64": lambda x: tokred.cluster_dpc_knn(x.double(), 1),
    "expected x contiguous in its last dimension, got strides [28, 1, 7]": (
        lambda x: tokred.cluster_dpc_knn(x.transpose(1, 2).contiguous().transpose(1, 2), 1)
    ),
    'expected order "index" or "score", got "size"': lambda x: tokred.cluster_dpc_knn(x, 1, order="size"),
    "expected drop_mask of dtype bool, got float32": lambda x: tokred.cluster_dpc_knn(
        x, 1, drop_mask=x[:, :, 0].contiguous()
    ),
    "expected drop_mask of shape [batch_size, num_tokens] = [2, 7], got [2, 4]": (
        lambda x: tokred.cluster_dpc_knn(x, 1, drop_mask=x[:, :4, 0].contiguous() > 0)
    ),
    "expected drop_mask of shape [total_tokens] = [7], got [6]": (
        lambda x: packed_call(x, drop_mask=x[0, :6, 0].contiguous() > 0)
    ),
    "expected drop_mask contiguous, got strides [0, 1]": (
        lambda x: tokred.cluster_dpc_knn(x, 1, drop_mask=(x[:1, :, 0] > 0).expand(2, 7))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(device, message):
    with pytest.raises(RuntimeError) as caught:
        ERRORS[message](torch.randn(2, 7, 4, device=device))
    assert f"cluster_dpc_knn: {message}" in str(caught.value)
