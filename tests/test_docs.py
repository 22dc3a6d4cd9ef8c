# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Examples in docstrings and the README run as pasted; what the pages say holds."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import tokred
from tokred import _registry

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [*(op.name for op in _registry.ops()), *_registry.composites()])
def test_docstring_example(name):
    text = getattr(tokred, name).__doc__
    test = doctest.DocTestParser().get_doctest(text, {"torch": torch, "tokred": tokred}, name, None, 0)
    assert test.examples
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert results.failed == 0


def test_readme_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_contracts_table():
    score = torch.tensor([[0.5, float("nan"), 0.9, 0.5, -0.0, 0.9]])
    x = torch.zeros(1, 6, 1)

    def kept(k, keep=None, drop=None):
        masks = {}
        for name, at in (("keep_mask", keep), ("drop_mask", drop)):
            if at is not None:
                masks[name] = torch.zeros(1, 6, dtype=torch.bool).index_fill(1, torch.tensor([at]), True)
        return tokred.prune_topk(x, score, k, **masks)[1][0].tolist()

    page = (ROOT / "docs" / "contracts.md").read_text()
    cases = ((1, {}), (3, {}), (5, {}), (3, {"keep": 1}), (3, {"drop": 2}), (6, {"drop": 2}))
    for (k, masks), row in zip(cases, re.findall(r"^\| `k=(\d)`(.*?)\| `(\[.*?\])`", page, re.M)):
        assert int(row[0]) == k and all(str(at) in row[1] for at in masks.values())
        assert str(kept(k, **masks)) == row[2]


def test_contracts_table_of_select_topk():
    score = torch.tensor([[0.5, float("nan"), 0.9, 0.5, -0.0, 0.9]])
    rows = re.findall(r"^\| `(select_topk\(.*?)` \| `(\[.*?\])`", (ROOT / "docs" / "contracts.md").read_text(), re.M)
    assert len(rows) == 6
    for call, result in rows:
        out = eval(call, {"select_topk": tokred.select_topk, "score": score, "torch": torch})
        assert str(out[0].tolist()) == result, call


@pytest.mark.parametrize("op", ["select_rule", "select_budget"])
def test_contracts_table_of_counts(op):
    """Lists without their -1."""
    score = torch.tensor([[0.5, float("nan"), 0.9, 0.5, -0.0, 0.9]])
    if op == "select_budget":
        score = torch.tensor([[[0.9, 0.9, 0.5, 0.1], [0.5, 0.9, 0.1, 0.1]]])
    rows = re.findall(rf"^\| `({op}\(.*?)` \| `(\[.*\])`", (ROOT / "docs" / "contracts.md").read_text(), re.M)
    assert len(rows) == (12 if op == "select_rule" else 3)
    for call, expected in rows:
        kept_idx, num_kept = eval(f"tokred.{call}", {"tokred": tokred, "score": score})
        lists = [kept[:n].tolist() for kept, n in zip(kept_idx.flatten(0, -2), num_kept.flatten().tolist())]
        assert (lists if op == "select_budget" else lists[0]) == eval(expected), call


def test_relative_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/simt/*.md")]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
