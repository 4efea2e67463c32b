"""The Triton kernel of int8 products: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorasmith.core import int8_kernel
from tests.core.triton_kernels import compiled, interpreted, stack_of

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


@pytest.mark.pairwise(
    dtype=[torch.float32, torch.float16],  # the interpreter has no products in bf16
    shape=[(1, 16, 16), (19, 80, 144), (130, 64, 16)],
    rank=[1, 12, 33],
    has_total=[False, True],
)
def test_a_narrow_product_and_a_total_are_added(
    product: Callable[..., Any], dtype: torch.dtype, shape: tuple[int, int, int], rank: int, has_total: bool
) -> None:
    """The narrow one of parts of wider matrices, as of layers that share an input."""
    (rows, inner, columns), g = shape, torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (rows, inner), generator=g, dtype=torch.int8)
    b = torch.randint(-127, 128, (columns, inner), generator=g, dtype=torch.int8).t()
    scale_a, scale_b = (torch.rand(size, generator=g) / 127**2 for size in ((rows, 1), (1, columns)))
    part = torch.randn(rows, 3 * rank, generator=g).to(dtype)[:, rank : 2 * rank]
    up = torch.randn(columns, rank, generator=g).to(dtype)
    total = torch.randn(rows, columns, generator=g).to(dtype) if has_total else None
    whole = a.double() @ b.double() * scale_a.double() * scale_b.double() + 0.7 * part.double() @ up.double().t()
    whole = whole if total is None else whole + total.double()
    y = product(a, scale_a, b, scale_b, dtype, None, (part, up.t(), 0.7), total)
    assert total is None or y is total
    torch.testing.assert_close(y.double(), whole, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-3)
    plain = product(a, scale_a, b, scale_b, dtype)
    assert torch.equal(product(a, scale_a, b, scale_b, dtype, None, (part, up.t(), 0.0)), plain)


def test_blocks_fit_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    for capability, rows, expected in (
        *(((9, 0), 128, int8_kernel.HOPPER_BLOCK), ((9, 0), 64, int8_kernel.BLOCK)),
        *(((one, 0), 128, int8_kernel.BLOCK) for one in (8, 10, 12)),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        int8_kernel.tiles.cache_clear()
        assert int8_kernel.tiles(device, rows)[0] == expected
    int8_kernel.tiles.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("order", ["b_inner", "b_column"])
def test_it_compiles_for_gpus(capability: int, order: str, rank: int) -> None:
    """To machine code with their instructions for int8; `order` is the stride of 1; runs have the first."""
    hopper = (int8_kernel.HOPPER_BLOCK, int8_kernel.HOPPER_LAUNCH)
    block, launch = hopper if capability == 90 else (int8_kernel.BLOCK, int8_kernel.LAUNCH)
    fixed = {**block, "block_rows": int8_kernel.BLOCK_ROWS[-1], "a_inner": 1, "scale_column": 1, order: 1}
    fixed |= {"has_bias": 1, "has_total": min(rank, 1), "block_rank": rank, "part_rank": 1}
    types = {"bias": "*bf16", "a": "*i8", "b": "*i8", "y": "*bf16", "scale_a": "*fp32", "scale_b": "*fp32"}
    types |= {"part": "*bf16", "second": "*bf16", "factor": "fp32", "inverse": "fp32"}
    found = compiled(int8_kernel, fixed, types, {"rows", "factor", "inverse"}, capability, options=launch)
    assert not stack_of(found.asm["cubin"]) or order == "b_column", "registers are spilled"
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in found.asm["ptx"]
    assert ".s32.s8.s8" in found.asm["ptx"]
    in_bytes = re.findall(r"(?:ld|st)\.shared\.[bus]8", found.asm["ptx"])
    assert not in_bytes or order == "b_column", "the loop moves bytes one by one"
    # 227 KB a block on Hopper, of which one is enough: it has the registers for two of eight warps of 128 each alone.
    assert found.metadata.shared <= (227 if capability == 90 else 99) * 1024
