"""Triton kernels without a GPU: modules whose kernels the interpreter runs, and machine code for GPUs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
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


class Traffic:
    """Bytes that an interpreted kernel moves to and from memory: sectors of 32, each once a program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import interpreter_builder

        self._builder = interpreter_builder
        self._sectors: set[tuple[object, bool, int]] = set()
        for name, is_store in (("create_masked_load", False), ("create_masked_store", True)):
            counted = partial(self._counted, getattr(interpreter_builder, name), is_store)
            monkeypatch.setattr(interpreter_builder, name, counted)

    @property
    def size_bytes(self) -> int:
        return 32 * len(self._sectors)

    def _counted(self, call: Any, is_store: bool, pointers: Any, *rest: Any) -> Any:
        mask = rest[1] if is_store else rest[0]
        program = self._builder.grid_idx
        self._sectors |= {(program, is_store, int(one) // 32) for one in pointers.data[mask.data].flat}
        return call(pointers, *rest)


def compiled(
    module: Any,
    fixed: Mapping[str, int | str],
    types: Mapping[str, str],
    uneven: Collection[str],
    capability: int,
    *,
    kernel: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The `kernel` of a module, or another one, for a GPU, with values of its constants and types of its other
    arguments, else i32.

    Arguments that are not `uneven` are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = kernel or module.kernel
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    even = [name for name in names if name not in (*uneven, *fixed)]
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in fixed.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options or module.LAUNCH))
    assert len(found.asm["cubin"]) > 0
    return found


def stack_of(cubin: bytes) -> int:
    """Bytes of memory that a thread of machine code has for registers that do not fit, by triton's copy of a tool."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", found))
