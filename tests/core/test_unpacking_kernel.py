"""The Triton kernel that unpacks weights: in Triton's interpreter, and compiled for GPUs that need not be here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.core import quantization, unpacking_kernel
from lorasmith.core.choices import Quantization
from lorasmith.core.kernels import Kernel
from lorasmith.core.quantization import Packed, nvfp4_codes, packed, scaled_codes
from tests.core.triton_kernels import Traffic, compiled, interpreted

pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = {"one row": (1, 64), "parts": (3, 2112), "a kernel": (4, 32, 3, 3), "of a clip": (2, 32, 1, 3, 3)}

KINDS: tuple[Quantization, ...] = (
    "int8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3_tensor", "fp8_e5m2_tensor", "mxfp8", "nf4", "nvfp4"
)  # fmt: skip


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Packed], Tensor]:
    """The weight, by the kernel in the interpreter where a GPU would take it."""
    run = interpreted("lorasmith.core.unpacking_kernel", monkeypatch).unpacked
    plain = quantization._kernel
    calls: list[str] = []

    def unpack(weight: Packed) -> Tensor:
        def kernel(kind: str | None, codes: Tensor, *others: Tensor) -> Callable[..., Tensor]:
            assert kind is not None
            calls.append(kind)
            return lambda *tensors: run(kind, *tensors)

        monkeypatch.setattr(quantization, "_kernel", kernel)
        found = weight.weight()
        monkeypatch.setattr(quantization, "_kernel", plain)
        assert calls, "no kernel was asked for"
        return found

    return unpack


@pytest.mark.pairwise(kind=KINDS, shape=SHAPES, dtype=[torch.float32, torch.float16])  # it does not round to bf16
def test_weights_are_those_of_torch(
    unpacked: Any, kind: Quantization, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if weight.ndim == 4:
        weight = weight.to(memory_format=torch.channels_last)
    weight = packed(weight, kind, dtype)
    found = unpacked(weight)
    assert torch.equal(found, weight.weight()) and found.stride() == weight.weight().stride()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's
@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_every_code_is_read(unpacked: Any, code: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(code)
    weight = scaled_codes(codes, torch.tensor([[0.1], [3.0]]), torch.float32)
    torch.testing.assert_close(unpacked(weight), weight.weight(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_every_exponent_is_read(unpacked: Any) -> None:
    exponents = torch.arange(256, dtype=torch.uint8).view(8, 32)
    codes = torch.linspace(-448, 448, 8 * 1024).view(8, 1024).to(torch.float8_e4m3fn)
    weight = quantization.mxfp8_codes(codes, exponents, torch.float32)
    torch.testing.assert_close(unpacked(weight), weight.weight(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("is_smooth", [False, True])
def test_nvfp4_of_files(unpacked: Any, rows: int, is_smooth: bool) -> None:
    """With one scale for the weight, and factors of the input."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (4, 40), generator=g, dtype=torch.uint8)
    blocks = torch.rand(4, 5, generator=g).to(torch.float8_e4m3fn)
    smoothing = (torch.rand(1, 80, generator=g),) * is_smooth
    weight = nvfp4_codes(codes, blocks, torch.rand(rows, 1, generator=g), torch.float32, *smoothing)
    assert torch.equal(unpacked(weight), weight.weight())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("_tensor")])
def test_it_moves_little_more_than_it_must(unpacked: Any, kind: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(torch.randn(4, 3072), kind, torch.float16)
    traffic = Traffic(monkeypatch)
    needed = weight.size_bytes + unpacked(weight).nbytes
    assert needed <= traffic.size_bytes <= 1.2 * needed


def test_a_gpu_that_gives_other_numbers_keeps_torchs_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a layer whose rows are not one after another."""
    asked = []

    def on(device: torch.device, kind: str) -> Kernel:
        asked.append(kind)
        return Kernel(kind, print, "it is refused" if kind == "nf4" else "")

    monkeypatch.setattr(quantization, "unpacking_on", on)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    codes, scale = (torch.zeros(4, 8, dtype=torch.uint8).as_subclass(OnGpu), torch.ones(4, 1))
    assert quantization._kernel("nf4", codes, scale) is None
    assert quantization._kernel("int8", codes, scale) is print
    assert quantization._kernel("int8", codes.t(), scale) is None
    assert asked == ["nf4", "int8"]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["nf4", *(kind for kind in unpacking_kernel.GROUPS if kind != "nf4")])
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_it_compiles_for_gpus(kind: str, capability: int) -> None:
    """In registers alone, with wide loads and stores, and rounded by the device."""
    group = unpacking_kernel.GROUPS[kind]
    fixed = {"kind": kind, "has_factors": 0, "block": unpacking_kernel.BLOCK, "group": group}
    bytes_of = {"codes": "*i8" if kind == "int8" else "*u8", "scales": "*u8" if kind in ("mxfp8", "nvfp4") else "*fp32"}
    types = {**bytes_of, "scales_of_rows": "*fp32", "table": "*fp32", "y": "*bf16"}
    found = compiled(unpacking_kernel, fixed, types, {"across", "scale_row"}, capability)
    ptx = found.asm["ptx"]
    assert found.metadata.shared == 0
    assert "st.global.v4.b32" in ptx and "cvt.rn.bf16" in ptx and "fma" not in ptx
    assert len(re.findall(r"st\.global", ptx)) == 1
    assert len(re.findall(r"ld\.global", ptx)) <= (10 if kind == "nf4" else 3)  # of it, 8 in the table
