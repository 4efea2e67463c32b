"""Models elsewhere and otherwise for a while, and the same bits afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.core import placement
from lorasmith.core.errors import OptionError
from lorasmith.core.placement import (
    best_device,
    chosen_device,
    dtype_from_name,
    fast_dtype,
    memory_format_for,
    multiplies,
    placed,
)

CPU = torch.device("cpu")


def model() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))
    return module.requires_grad_(False)


def state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: (id(t), t.data_ptr(), t.dtype, t.stride(), t.tolist()) for name, t in tensors}


def test_floating_point_alone_is_converted_and_all_of_it_comes_back() -> None:
    for dtype in [torch.float32, torch.bfloat16, torch.float16, torch.float64]:
        module = model()
        before = state(module)
        with placed(module, device=CPU, dtype=dtype):
            assert {t.dtype for t in [*module.parameters(), module[1].running_mean]} == {dtype}
            assert module[1].num_batches_tracked.dtype == torch.int64
            assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert state(module) == before


def test_an_exception_brings_the_model_back_too() -> None:
    module = model()
    before = state(module)
    with pytest.raises(ZeroDivisionError), placed(module, device=CPU, dtype=torch.bfloat16):
        raise ZeroDivisionError
    assert state(module) == before


def test_a_device_that_refuses_half_way_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module, original, calls = model(), torch.Tensor.to, []

    def full(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no room")
        return original(tensor, *args, **kwargs)

    before = state(module)
    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError), placed(module, device=CPU, dtype=torch.bfloat16):
        pass
    assert state(module) == before


def test_what_is_there_already_is_not_copied() -> None:
    linear = nn.Linear(4, 4)
    before = state(linear)
    with placed(linear, device=CPU, dtype=torch.float32):
        assert state(linear) == before


def test_fp32_weights_lie_aligned_on_the_cpu_wherever_their_file_has_them() -> None:
    """Products in fp32 depend on addresses in the last bits; 16-bit ones do not, and get no memory."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        memory = torch.zeros(80 * dtype.itemsize, dtype=torch.uint8)
        linear = nn.Linear(8, 8, bias=False).requires_grad_(False)
        linear.weight.data = memory[8 : 8 + 64 * dtype.itemsize].view(dtype).reshape(8, 8)
        before = state(linear)
        with placed(linear, device=CPU, dtype=dtype):
            assert linear.weight.tolist() == before["weight"][-1]
            moved[dtype] = linear.weight.data_ptr() % 64 == 0
        assert state(linear) == before
    assert moved == {torch.float32: True, torch.bfloat16: False}


def test_what_was_put_in_meanwhile_is_taken_out() -> None:
    """Patches applied inside end inside, so what comes back is what was there before."""
    linear = nn.Linear(4, 4)
    before = state(linear)
    with placed(linear, device=CPU, dtype=torch.bfloat16), placed(linear, device=CPU, dtype=torch.float16):
        assert linear.weight.dtype == torch.float16
    assert state(linear) == before


def test_convolutional_models_run_channels_last() -> None:
    for make, expected in [
        (lambda: nn.Conv2d(2, 2, 3), torch.channels_last),
        (lambda: nn.Conv2d(2, 2, 1), torch.contiguous_format),
        (lambda: nn.Linear(2, 2), torch.contiguous_format),
    ]:
        assert memory_format_for(nn.Sequential(make())) == expected


def test_the_best_device_is_one_that_works() -> None:
    assert torch.ones(1, device=best_device()).item() == 1


@pytest.mark.parametrize(
    ("built", "capability", "is_taken"),
    [
        (["sm_75", "sm_80", "sm_90", "compute_90"], (6, 1), False),
        (["sm_75", "sm_80", "sm_90", "compute_90"], (8, 9), True),  # machine code of 8.0
        (["sm_80", "sm_90", "compute_90"], (12, 0), True),  # compiled by the driver
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_90a", "sm_100", "sm_120"], (12, 1), True),
        ([], (5, 0), True),  # torch does not say
    ],
)
def test_a_card_without_kernels_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, built: list[str], capability: tuple[int, int], is_taken: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GTX 1080")
    monkeypatch.setattr(placement, "best_device", lambda: torch.device("cuda"))
    if is_taken:
        assert chosen_device(None) == torch.device("cuda")
    else:
        with pytest.raises(OptionError, match=r"has kernels \(compute capability .*\), got GTX 1080 with .*--install"):
            chosen_device(None)


def test_a_driver_that_torch_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match=r"here \(cpu\), as there is an NVIDIA driver, .* got 'cuda'; .*--install"):
        chosen_device("cuda")


@pytest.mark.parametrize(
    ("known", "limit", "formats"),
    [
        ({"avx512_bf16": True}, "", {"bf16"}),
        ({"amx_bf16": True, "avx512_bf16": False}, "", {"bf16"}),
        ({"bf16": True, "fp16_arith": True}, "", {"bf16", "fp16"}),
        ({"avx512_bw": True, "avx512_bf16": False}, "", set()),
        ({}, "", set()),
        ({"avx512_bf16": True, "avx512_fp16": True}, "AVX2", set()),
        ({"avx512_bf16": True, "avx512_fp16": True}, "avx512_core", set()),
        ({"avx512_bf16": True, "avx512_fp16": True}, "AVX512_CORE_BF16", {"bf16"}),
        ({"avx512_bf16": True, "avx512_fp16": True}, "AVX512_CORE_AMX", {"bf16", "fp16"}),
    ],
)
def test_a_processor_multiplies_in_the_formats_of_its_instructions(
    known: dict[str, bool], limit: str, formats: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert {name for name in ("bf16", "fp16") if multiplies(dtype_from_name(name), CPU)} == formats
    assert multiplies(torch.float32, CPU)
    assert fast_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if "bf16" in formats else torch.float32)


@pytest.mark.parametrize(
    ("capability", "formats"),
    [((6, 1), set()), ((7, 0), {"fp16"}), ((7, 5), {"fp16"}), ((8, 0), {"bf16", "fp16"}), ((12, 0), {"bf16", "fp16"})],
    ids=["Pascal", "Volta", "Turing", "Ampere", "Blackwell"],
)
def test_a_card_multiplies_in_the_formats_of_its_own_generation(
    capability: tuple[int, int], formats: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first card of a machine may be of another generation."""
    cards = {torch.device("cuda:0"): (8, 9), torch.device("cuda:1"): capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[device])
    card = torch.device("cuda:1")
    assert {name for name in ("bf16", "fp16") if multiplies(dtype_from_name(name), card)} == formats
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert multiplies(torch.bfloat16, card)
    assert multiplies(torch.bfloat16, torch.device("mps"))


def test_constants_that_no_file_holds_stay_in_fp32() -> None:
    module = nn.Module()
    module.register_buffer("inv_freq", torch.tensor([0.1]), persistent=False)
    module.register_buffer("positions", torch.arange(2), persistent=False)
    module.register_buffer("mean", torch.tensor([0.1]))
    with placed(module, device=CPU, dtype=torch.bfloat16):
        assert torch.equal(module.inv_freq, torch.tensor([0.1]))
        assert (module.positions.dtype, module.mean.dtype) == (torch.int64, torch.bfloat16)


@pytest.mark.parametrize(
    ("variables", "code", "expected"),
    [
        ({}, "", ("highest", True)),
        ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, "", ("high", True)),
        ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "NVIDIA_TF32_OVERRIDE": "0"}, "", ("highest", False)),
        ({}, "b.cuda.matmul.fp32_precision = 'tf32'", ("high", True)),
        ({}, "b.cudnn.conv.fp32_precision = 'ieee'", ("highest", False)),
    ],
    ids=["torch's own", "NVIDIA's images", "never", "products by new names", "convolutions by new names"],
)
def test_how_fp32_is_computed_is_read_wherever_it_was_set(
    variables: dict[str, str], code: str, expected: tuple[str, bool]
) -> None:
    """By torch itself, which reads variables once, and whose earlier names raise after its new ones were used."""
    if code and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch has one name for it")
    program = f"""
import torch, torch.backends as b
from lorasmith.core.placement import fp32_products, has_tf32_convolutions
{code}
assert (fp32_products(), has_tf32_convolutions()) == {expected}, (fp32_products(), has_tf32_convolutions())
"""
    others = {name: value for name, value in os.environ.items() if "TF32" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**others, **variables}, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
