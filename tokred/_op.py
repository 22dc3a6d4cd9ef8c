# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""What every op's registration shares: autocast, vmap, the refusal to differentiate, checks for fakes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Sample = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a public function, as (args, kwargs); each op's ``sample_inputs`` returns a list of them."""

Floor = tuple[int, int]
"""What a perfect kernel does in a call: bytes it moves, and flops of its matrix products. Each op's module has a ``floor``
with the arguments of the public function; it looks at shapes and dtypes alone."""

_library = torch.library.Library("tokred", "IMPL")

forward_only: set[str] = set()
"""Ops (with overload) whose backward raises."""


def no_gradient(name: str, hint: str) -> None:
    """Make the backward of ``tokred::name`` raise; ``hint`` says what to use instead."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name.split('.')[0]}: has no gradient; {hint}")

    torch.library.register_autograd(f"tokred::{name}", backward, setup_context=lambda ctx, inputs, output: None)
    forward_only.add(name)


def autocast(name: str, num_cast: int, first: int = 0) -> None:
    """Cast ``num_cast`` arguments of ``tokred::name``, from number ``first`` on, to the autocast dtype, and no others."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.tokred, packet), overload or "default")

    def register(device_type: str, key_name: str) -> None:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key_name))

        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype, floats = torch.get_autocast_dtype(device_type), (torch.float32, torch.float16, torch.bfloat16)
            cast = tuple(
                arg.to(dtype) if first <= i < first + num_cast and arg.dtype in floats else arg
                for i, arg in enumerate(args)
            )
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*cast, **kwargs)

        _library.impl(name, kernel, key_name)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


def fold_vmap(name: str, shared: Sequence[int] = (), absent: Sequence[int] = ()) -> None:
    """Give ``tokred::name`` the vmap rule that ``fold_rule`` makes."""
    torch.library.register_vmap(f"tokred::{name}", fold_rule(name, shared, absent))


def fold_rule(name: str, shared: Sequence[int] = (), absent: Sequence[int] = ()) -> Callable[..., tuple[Any, Any]]:
    """Return a vmap rule of ``tokred::name``: the mapped dimension is folded into the batch dimension, each tensor's first.

    ``shared`` lists positions of tensor arguments without a batch dimension; they must not be mapped. ``absent`` lists those
    of arguments that leave the others without one (``cu_seqlens``); they must be None.
    """
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.tokred, packet), overload or "default")

    def fold(x: Any, dim: Any, size: int) -> Any:
        if isinstance(x, (list, tuple)) and any(isinstance(item, Tensor) for item in x):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(x)
            return [fold(item, d, size) for item, d in zip(x, dims)]
        if not isinstance(x, Tensor):
            return x
        moved = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return moved.flatten(0, 1)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if any(args[i] is not None for i in absent if i < len(args)):
            raise RuntimeError(f"{packet}: a packed input has no batch dimension and cannot be mapped by vmap")
        folded = []
        for i, (arg, dim) in enumerate(zip(args, in_dims)):
            if i in shared:
                if dim is not None:
                    raise RuntimeError(f"{packet}: argument {i} has no batch dimension and cannot be mapped by vmap")
                folded.append(arg)
            else:
                folded.append(fold(arg, dim, size))
        out = op(*folded)

        def unfold(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(unfold(item) for item in x)
            return x.unflatten(0, (size, x.shape[0] // size))

        def dims_of(x: Any) -> Any:
            return type(x)(dims_of(item) for item in x) if isinstance(x, (list, tuple)) else 0

        return unfold(out), dims_of(out)

    return rule


def no_vmap(name: str, why: str) -> None:
    """Make vmap over ``tokred::name`` an error that says why."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        raise RuntimeError(f"{name}: {why} and cannot be mapped by vmap")

    torch.library.register_vmap(f"tokred::{name}", rule)


def noise_bits(seed: int, row: int, count: int, device: torch.device) -> Tensor:
    """Return 64 bits of noise, as int64, for each position of a row: the kernels' (splitmix64 of seed, row and position)."""
    step, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def signed(z: int) -> int:
        return (z & mask) - ((z & mask) >> 63 << 64)

    def mix(z: Tensor) -> Tensor:  # >> of a negative number brings in ones
        z = (z ^ ((z >> 30) & (2**34 - 1))) * signed(0xBF58476D1CE4E5B9)
        z = (z ^ ((z >> 27) & (2**37 - 1))) * signed(0x94D049BB133111EB)
        return z ^ ((z >> 31) & (2**33 - 1))

    of_row = mix(torch.tensor(signed(seed + step * (row + 1)), device=device))
    return mix(of_row + torch.arange(1, count + 1, device=device) * signed(step))


def seeded(device: torch.device | str) -> Callable[..., Tensor]:
    """Return a ``randn`` of a fixed seed, drawn on the CPU so that every device sees the same numbers."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    return randn
