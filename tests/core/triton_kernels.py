"""Triton kernels without a GPU: modules whose kernels the interpreter runs, and machine code for GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

import pytest


def interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of kernels that the interpreter runs, whichever way the module itself was imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(
    module: Any, fixed: Mapping[str, int], types: Mapping[str, str], uneven: Collection[str], capability: int
) -> Any:
    """The `kernel` of a module for a GPU, with values of its constants and types of its other arguments, else i32.

    Arguments that are not `uneven` are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    names = module.kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    even = [name for name in names if name not in (*uneven, *fixed)]
    source = triton.compiler.ASTSource(
        module.kernel,
        signature,
        {(names.index(name),): value for name, value in fixed.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(module.LAUNCH))
    assert len(found.asm["cubin"]) > 0
    return found
