# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""Peers: what an op is measured against. Compositions stand in the op's benchmark; libraries are plug-ins.

A plug-in is one file, ``benchmarks/peers/NAME.py``. It imports its library at the top (where that fails, the peer is
skipped with the reason) and holds

- ``VERSION``: of the library that was found,
- ``DEVICES``: where it runs,
- ``OPS``: a ``Peer`` by the name of the op,
- and, if it compiles for seconds per case, ``COMPILES = True``: a smoke run leaves it out.
"""

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any


class NotApplicable(Exception):
    """Raised by a peer's ``prepare`` for inputs that it has no answer to; the message is the reason that is printed."""


def _same(*inputs: Any) -> tuple[Any, ...]:
    return inputs


def _whole(out: Any) -> Any:
    return out


@dataclass(frozen=True)
class Peer:
    """How a library does an op's work.

    Args:
        run: What is timed; called with what ``prepare`` returned.
        prepare: Brings a copy of the case's inputs into the library's form: views, page tables, plans. Not timed.
            Raises ``NotApplicable`` where the library cannot do this case.
        finish: Brings the library's output into the form of tokred's, for the comparison. Not timed.
        captures: Whether a CUDA graph may be tried.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] = _same
    finish: Callable[[Any], Any] = _whole
    captures: bool = True


def load_file(path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(f"tokred_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: The compositions in the benchmark files, and torch.compile of them.
BUILT_IN = ("aten", "compile")


@dataclass
class Peers:
    """The peers of a run, by device.

    Args:
        device: "cpu" or "cuda".
        folder: Of the plug-ins; None for none.
        wanted: Names that may run, or None for all.
        quick: Leave out, unless ``wanted``, what compiles for seconds per case.
        skipped: Why a plug-in does not run at all, by name; filled as they are asked for.
        versions: Of the plug-ins that were found.
    """

    device: str
    folder: Path | None = None
    wanted: Collection[str] | None = None
    quick: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    _loaded: dict[str, ModuleType | None] = field(default_factory=dict)

    def known(self) -> list[str]:
        """Return every name that ``wanted`` may hold."""
        files = sorted(self.folder.glob("*.py")) if self.folder else []
        return [*BUILT_IN, *(path.stem for path in files)]

    def wants(self, name: str) -> bool:
        """Whether a peer may run."""
        if self.wanted is None:
            return not (self.quick and name == "compile")
        return name in self.wanted

    def find(self, name: str, op: str) -> Peer | None:
        """Return a plug-in's peer for an op, or None, with the reason in ``skipped``, where it cannot run here."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        module = self._loaded[name]
        if module is None:
            return None
        if op not in module.OPS:
            raise KeyError(f"benchmarks/peers/{name}.py has no {op}; it has {', '.join(module.OPS)}")
        found: Peer = module.OPS[op]
        return found

    def _load(self, name: str) -> ModuleType | None:
        if name not in self.known():
            raise KeyError(f"no peer named {name}; there are {', '.join(self.known())}")
        assert self.folder is not None
        try:
            module = load_file(self.folder / f"{name}.py")
        except Exception as error:  # a library may fail to import in any way
            lines = str(error).strip().splitlines() or [""]
            self.skipped[name] = f"{type(error).__name__}: {lines[0]}"
            return None
        if self.device not in module.DEVICES:
            self.skipped[name] = f"runs on {', '.join(module.DEVICES)}, not on {self.device}"
            return None
        if self.quick and self.wanted is None and getattr(module, "COMPILES", False):
            self.skipped[name] = "compiles for seconds per case: left out of a smoke run"
            return None
        self.versions[name] = module.VERSION
        return module
