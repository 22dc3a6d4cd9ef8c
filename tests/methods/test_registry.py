# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
import importlib
from pathlib import Path

from tokred import methods


def test_every_method_is_described_and_callable():
    for entry in methods.registry():
        module = importlib.import_module(f"tokred.methods.{entry.name}")
        assert callable(getattr(module, entry.name))
        assert entry.paper and entry.stage and entry.basis in ("authors' code", "paper", "abstract only")
        assert (Path(__file__).parent / f"test_{entry.name}.py").exists()


def test_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert page.read_text() == methods.markdown(), "run: python -m tokred methods --markdown > docs/methods.md"
