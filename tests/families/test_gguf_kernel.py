"""The Triton kernel that unpacks GGUF's blocks: interpreted, and compiled for GPUs that need not be here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorasmith.families.files import gguf, gguf_kernel
from tests.core.triton_kernels import Traffic, compiled, interpreted

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("gguf")


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module's function, run by the interpreter."""
    return interpreted("lorasmith.families.files.gguf_kernel", monkeypatch).unpacked


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # numpy's
@pytest.mark.parametrize("kind", gguf._PARTS)
def test_blocks_are_those_of_diffusers_and_read_once(unpacked: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any bytes, scales that are infinite or no numbers among them."""
    _, size, size_bytes = gguf._decoders()[kind]
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (24 * 256 // size + 1, size_bytes), generator=g, dtype=torch.uint8)
    expected = gguf._from_blocks(codes, dtype=torch.float32, kind=kind, inside=(size,)).view(-1)
    y, traffic = torch.empty_like(expected), Traffic(monkeypatch)
    unpacked(kind, gguf._PARTS[kind], size, size_bytes, codes, y)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    needed = codes.nbytes + y.nbytes
    assert needed <= traffic.size_bytes <= 1.2 * needed


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", gguf._PARTS)
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_it_compiles_for_gpus(kind: str, capability: int) -> None:
    _, size, size_bytes = gguf._decoders()[kind]
    parts = gguf._PARTS[kind]
    sizes = {"parts": parts, "width": size // parts, "size_bytes": size_bytes, "numbers": gguf_kernel.NUMBERS}
    found = compiled(gguf_kernel, {"kind": kind, **sizes}, {"codes": "*u8", "y": "*bf16"}, {"blocks"}, capability)
    assert found.metadata.shared == 0
    assert "st.global.v4.b32" in found.asm["ptx"] and "fma" not in found.asm["ptx"]
