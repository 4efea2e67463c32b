"""The Triton kernel that rounds rows: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorasmith.core import quantized_products, rounding_kernel
from tests.core.triton_kernels import compiled, interpreted

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module's function, run by the interpreter."""
    return interpreted("lorasmith.core.rounding_kernel", monkeypatch).rounded


@pytest.mark.pairwise(
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    shape={"one": (1, 1), "a part": (3, 144), "blocks": (2, 2500)},
    has_factors=[False, True],
    in_columns=[False, True],
)
def test_it_has_the_codes_and_scales_of_torch(
    rounded: Any, dtype: torch.dtype, shape: tuple[int, int], has_factors: bool, in_columns: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    rows = (torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g)).to(dtype)
    rows[:, 0] = 0
    rows = rows.t().contiguous().t() if in_columns else rows
    factors = torch.rand(shape[1], generator=g) if has_factors else None
    expected = quantized_products.rounded_by_torch(rows, torch.int8, 127.0, factors)
    assert all(map(torch.equal, rounded(rows, torch.int8, 127.0, factors), expected))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_fault_is_in_the_scale_of_its_row(rounded: Any, fault: float) -> None:
    rows = torch.ones(2, 1500)
    rows[0, 1400] = fault
    _, scales = rounded(rows, torch.int8, 127.0, None)
    assert scales.isfinite().flatten().tolist() == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "kind"), [(80, "i8"), (89, "fp8e4nv"), (90, "i8"), (120, "fp8e4nv")])
@pytest.mark.parametrize("has_factors", [0, 1])
def test_it_compiles_for_gpus(capability: int, kind: str, has_factors: int) -> None:
    fixed = {**rounding_kernel.BLOCK, "has_factors": has_factors, "is_int8": int(kind == "i8"), "x_column": 1}
    types = {"x": "*bf16", "factors": "*fp32", "codes": f"*{kind}", "scales": "*fp32", "largest": "fp32"}
    ptx = compiled(rounding_kernel, fixed, types, {"largest"}, capability).asm["ptx"]
    assert "div.rn.f32" in ptx and "fma.rn.f32" not in ptx
    assert kind == "i8" or "e4m3x2" in ptx
