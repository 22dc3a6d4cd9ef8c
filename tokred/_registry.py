# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""What is registered: the ops of the loaded library with their Python modules. There is no list to keep."""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

import tokred
from tokred.testing.compare import TOLERANCE


@dataclass(frozen=True)
class Op:
    """A public op: its name, family, module (function, reference, sample_inputs) and schemas by overload."""

    name: str
    family: str
    module: ModuleType
    schemas: dict[str, str]

    @property
    def function(self) -> Any:
        """The public function, ``tokred.NAME``."""
        return getattr(self.module, self.name)

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return rtol and atol against the reference: the module's TOLERANCE, or the library's for one rounding.

        Integers are compared exactly.
        """
        found = getattr(self.module, "TOLERANCE", {}).get(dtype) or TOLERANCE.get(dtype)
        return found or (0.0, 0.0)

    def has_kernel(self, key: str, overload: str = "") -> bool:
        """Whether an overload has a kernel for a dispatch key, for example "CUDA"."""
        name = f"tokred::{self.name}" + (f".{overload}" if overload else "")
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


def families() -> dict[str, list[str]]:
    """Return each family (a subpackage with ops) and the names of its modules."""
    found = {}
    for package in pkgutil.iter_modules(tokred.__path__):
        if package.ispkg and package.name not in ("methods", "patch", "testing"):
            path = importlib.import_module(f"tokred.{package.name}").__path__
            found[package.name] = [m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")]
    return found


def ops() -> list[Op]:
    """Return every registered op, by family and name."""
    schemas: dict[str, dict[str, str]] = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("tokred::"):
            schemas.setdefault(schema.name.removeprefix("tokred::"), {})[schema.overload_name] = str(schema)
    found = []
    for family, modules in families().items():
        for name in modules:
            if name in schemas:
                module = importlib.import_module(f"tokred.{family}.{name}")
                found.append(Op(name, family, module, schemas.pop(name)))
    if schemas:
        raise RuntimeError(f"tokred: registered without a Python module: {', '.join(sorted(schemas))}")
    return found


def composites() -> dict[str, ModuleType]:
    """Return the modules of public functions that are made of ops and have no kernel, by name."""
    known = {o.name for o in ops()}
    return {
        name: importlib.import_module(f"tokred.{family}.{name}")
        for family, modules in families().items()
        for name in modules
        if name not in known
    }


def op(name: str) -> Op:
    """Return one op by name."""
    found = {o.name: o for o in ops()}
    if name not in found:
        raise KeyError(f"tokred: no op named {name!r}; there are {', '.join(sorted(found))}")
    return found[name]
