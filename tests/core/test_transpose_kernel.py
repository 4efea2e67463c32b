"""The Triton kernel that transposes codes: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

import re

import pytest
import torch

from lorasmith.core import transpose_kernel
from tests.core.triton_kernels import Traffic, compiled, interpreted

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("shape", [(16, 16), (48, 144), (256, 128), (132, 260)])
def test_it_is_the_transpose_and_moves_what_it_must(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    transposed = interpreted("lorasmith.core.transpose_kernel", monkeypatch).transposed
    codes = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    traffic = Traffic(monkeypatch)
    assert torch.equal(transposed(codes), codes.t())
    if not any(size % 128 for size in shape):
        assert traffic.size_bytes == 2 * codes.nbytes
    found = transposed(codes.view(torch.float8_e4m3fn))
    assert found.dtype == torch.float8_e4m3fn and torch.equal(found.view(torch.int8), codes.t())


@pytest.mark.parametrize("capability", [90, *(pytest.param(one, marks=pytest.mark.slow) for one in (80, 89, 120))])
def test_it_moves_no_single_bytes(capability: int) -> None:
    ptx = compiled(transpose_kernel, transpose_kernel.BLOCK, {"x": "*i32", "y": "*i32"}, {"wide"}, capability).asm[
        "ptx"
    ]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    assert not re.findall(r"(?:ld|st)\.(?:shared|global)\.[bus]8", ptx)
