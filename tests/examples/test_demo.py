# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""The demo's table, small: its claims about accuracy and tokens, and the files it writes."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import demo
import digits_vit


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new"
    before = torch.get_num_threads()
    try:
        assert demo.main(["--smoke", "--threads", "1", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(before)
    return out, json.loads((out / "digits.json").read_text())


@pytest.fixture(scope="module")
def model():
    return digits_vit.load()


@pytest.fixture(scope="module")
def images():
    return digits_vit.enlarge(digits_vit.load_digits().test_scans[:8])


def test_table(smoke):
    out, content = smoke
    rows = content["rows"]
    assert [row["num_images"] for row in rows] == [40] * 7
    assert rows[0]["method"] == "all tokens" and rows[0]["num_wrong"] <= 1
    assert all(row["num_wrong"] <= rows[0]["num_wrong"] + 3 for row in rows)
    assert all(row["images_per_second"] > 0 and row["peak_mib"] > 0 for row in rows)
    assert [row["tokens"][-1] for row in rows[:4]] == [257, 129, 33, 9]
    assert content["facts"]["cores"] == 1
    assert {"cpu", "torch", "tokred", "commit"} <= set(content["facts"])
    text = (out / "digits.md").read_text()
    assert all(row["method"] in text and row["budget"] in text for row in rows)


def test_memory_falls_with_the_tokens(smoke):
    """All rows run the first block whole; in the second half fewer tokens need less memory."""
    late = [row["peak_late_mib"] for row in smoke[1]["rows"]]
    assert late[0] > late[1] > late[2] > late[3]
    assert late[0] > late[4] > late[5] > late[6]
    assert late[3] < late[0] / 10  # 9 tokens of 257


@torch.inference_mode()
def test_pruning_processes_fewer_tokens(model, images):
    tokens = demo.count_tokens(model, images, demo.Prune(64))
    assert tokens == [257, 257, 257] + [65] * 9  # attention and MLP of six blocks; block 2 prunes in between


@torch.inference_mode()
def test_merging_processes_fewer_tokens(model, images):
    tokens = demo.count_tokens(model, images, demo.Merge(32))
    assert tokens == [257, 225, 225, 193, 193, 161, 161, 129, 129, 97, 97, 65]


@torch.inference_mode()
def test_pruning_equals_plain_torch(model, images):
    """The same patches and logits as digits_vit's own pruner, which is plain PyTorch."""
    ours, plain = demo.Prune(64, layer_idx=2), digits_vit.ClsPruner(64, layer_idx=2)
    assert torch.allclose(model(images, ours), model(images, plain), atol=1e-4)


@torch.inference_mode()
def test_merge_maps_compose(model, images):
    """Through all blocks: each group as large as its size says, CLS alone in row 0, all rows in use."""
    sizes = []
    merge = demo.Merge(48)

    def recording(layer_idx, x, q, k, size):
        x, size = merge(layer_idx, x, q, k, size)
        sizes.append(size)
        return x, size

    model(images, recording)
    assert len(merge.dst_idx) == len(sizes) == 6
    for dst_idx, size in zip(merge.dst_idx, sizes):
        counts = torch.stack([row.bincount(minlength=size.shape[1]) for row in dst_idx])
        assert torch.equal(counts.float(), size) and counts.min() > 0
        assert bool((dst_idx[:, 0] == 0).all()) and bool((counts[:, 0] == 1).all())
