"""The Triton kernel of int8 products: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The module's product, run by the interpreter, whichever way the module itself was imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("lorasmith.core.int8_kernel")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.product


@pytest.mark.parametrize("in_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 16, 16), (19, 80, 144), (130, 64, 16)], ids=["one row", "parts", "blocks"]
)
def test_it_is_the_product_of_integers_with_scales(
    interpreted: Callable[..., Any], rows: int, inner: int, columns: int, in_columns: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (rows, inner), generator=g, dtype=torch.int8)
    b = torch.randint(-127, 128, (inner, columns), generator=g, dtype=torch.int8)
    scale_a, scale_b = torch.rand(rows, 1, generator=g), torch.rand(1, columns, generator=g)
    whole = a.double() @ b.double() * scale_a.double()
    b = b.t().contiguous().t() if in_columns else b
    for scale in (scale_b, scale_b[:, :1]):
        y = interpreted(a, scale_a, b, scale, torch.float32)
        torch.testing.assert_close(y.double(), whole * scale.double(), rtol=1e-6, atol=0)
    assert interpreted(a, scale_a, b, scale_b, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("order", ["b_inner", "b_column"])
def test_it_compiles_for_gpus(capability: int, order: str) -> None:
    """To machine code with their instructions for int8; `order` is the stride of 1: the weight transposed, or not."""
    import triton
    from triton.backends.compiler import GPUTarget

    from lorasmith.core.int8_kernel import BLOCK, BLOCK_ROWS, LAUNCH, kernel

    names = kernel.arg_names
    fixed = {**BLOCK, "block_rows": BLOCK_ROWS[-1], "a_inner": 1, "scale_column": 1, order: 1}
    types = {"a": "*i8", "b": "*i8", "y": "*bf16", "scale_a": "*fp32", "scale_b": "*fp32"}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    even = [name for name in names if name not in ("rows", *fixed)]
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in fixed.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(LAUNCH))
    assert len(compiled.asm["cubin"]) > 0
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
    assert ".s32.s8.s8" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024  # of the smallest of these GPUs
