"""The Triton kernel of rotary embeddings: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from lorasmith.training.memory import rotary_kernel
from tests.core.triton_kernels import compiled, interpreted
from tests.training.memory.test_backward_passes import angles, laid_out, random

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module's function, run by the interpreter."""
    return interpreted("lorasmith.training.memory.rotary_kernel", monkeypatch).turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter does not round to bf16
@pytest.mark.parametrize(
    ("shape", "swapped"),
    [((2, 6, 3, 16), (0, 0)), ((2, 6, 3, 16), (1, 2)), ((1, 1, 1, 2), (0, 0)), ((1, 17, 2, 24), (0, 1))],
    ids=["rows", "heads first", "one pair", "blocks"],
)
def test_it_has_the_bits_of_diffusers(
    turned: Any, dtype: torch.dtype, shape: tuple[int, ...], swapped: tuple[int, int]
) -> None:
    x = laid_out(random(*shape, dtype=dtype), swapped)
    cos, sin = angles(shape[1], shape[3])
    for direction in (1.0, -1.0):
        y = turned(x, torch.complex(cos, sin)[:, ::2], direction)
        assert y.is_contiguous()
        assert torch.equal(y, apply_rotary_emb(x, (cos, direction * sin), sequence_dim=1))


@pytest.mark.parametrize("batch", [1, 3])
def test_samples_may_have_tables_of_their_own(turned: Any, batch: int) -> None:
    x, each = random(3, 5, 2, 16), [torch.complex(*angles(5, 16))[:, ::2] * 1j**number for number in range(batch)]
    y = turned(x, torch.stack(each), 1.0)
    for number in range(3):
        assert torch.equal(y[number], turned(x[number : number + 1], each[number % batch], 1.0)[0])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_it_compiles_for_gpus(capability: int) -> None:
    fixed = {**rotary_kernel.BLOCK, "features": 128, "padded": 128}
    types = {"x": "*bf16", "y": "*bf16", "table": "*fp32", "direction": "fp32"}
    found = compiled(rotary_kernel, fixed, types, {"direction", "rows", "tokens", "heads"}, capability)
    ptx = found.asm["ptx"]
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx  # 16 bytes at a time
    assert "fma.rn.f32" not in ptx and "cvt.rn" in ptx
