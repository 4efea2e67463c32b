"""The Triton kernel of int8 products: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorasmith.core import int8_kernel
from tests.core.triton_kernels import compiled, interpreted

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module's function, run by the interpreter."""
    return interpreted("lorasmith.core.int8_kernel", monkeypatch).product


@pytest.mark.parametrize("in_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 16, 16), (19, 80, 144), (130, 64, 16)], ids=["one row", "parts", "blocks"]
)
def test_it_is_the_product_of_integers_with_scales(
    product: Callable[..., Any], rows: int, inner: int, columns: int, in_columns: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (rows, inner), generator=g, dtype=torch.int8)
    b = torch.randint(-127, 128, (inner, columns), generator=g, dtype=torch.int8)
    scale_a, scale_b = torch.rand(rows, 1, generator=g), torch.rand(1, columns, generator=g)
    whole = a.double() @ b.double() * scale_a.double()
    b = b.t().contiguous().t() if in_columns else b
    for scale in (scale_b, scale_b[:, :1]):
        y = product(a, scale_a, b, scale, torch.float32)
        torch.testing.assert_close(y.double(), whole * scale.double(), rtol=1e-6, atol=0)
    bias = torch.rand(columns, generator=g).half()
    y = product(a, scale_a, b, scale_b, torch.float32, bias)
    torch.testing.assert_close(y.double(), whole * scale_b.double() + bias, rtol=1e-6, atol=1e-3)
    assert product(a, scale_a, b, scale_b, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("order", ["b_inner", "b_column"])
def test_it_compiles_for_gpus(capability: int, order: str) -> None:
    """To machine code with their instructions for int8; `order` is the stride of 1; runs have the first."""
    fixed = {**int8_kernel.BLOCK, "block_rows": int8_kernel.BLOCK_ROWS[-1], "a_inner": 1, "scale_column": 1, order: 1}
    fixed["has_bias"] = 1
    types = {"bias": "*bf16", "a": "*i8", "b": "*i8", "y": "*bf16", "scale_a": "*fp32", "scale_b": "*fp32"}
    found = compiled(int8_kernel, fixed, types, {"rows"}, capability)
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in found.asm["ptx"]
    assert ".s32.s8.s8" in found.asm["ptx"]
    in_bytes = re.findall(r"(?:ld|st)\.shared\.[bus]8", found.asm["ptx"])
    assert not in_bytes or order == "b_column", "the loop moves bytes one by one"
    assert found.metadata.shared <= 99 * 1024  # of the smallest of these GPUs
