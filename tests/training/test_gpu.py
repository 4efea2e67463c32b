"""The same run on a GPU: the same draws, losses that agree, and nothing left on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.fp8_products import Fp8Products, has_fp8_products
from lorasmith.core.quantization import PACKINGS, packed
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.sampling.generate import generate
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Warned
from lorasmith.training.lora_handle import Lora
from lorasmith.training.memory import activations
from lorasmith.training.memory.compilation import compiler
from lorasmith.training.memory.frozen_weights import kept
from lorasmith.training.memory.weight_stream import WeightStream
from lorasmith.training.train import TrainResult, plan_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_losses_agree_with_the_cpus(
    run: Callable[..., TrainResult], mixed: EncodedDataset, dtype: str, tolerance: float
) -> None:
    on_cpu, on_gpu = (run(mixed, training_dtype=dtype, batch_size=3, device=one) for one in ("cpu", "cuda"))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=tolerance)


def test_the_model_comes_back_to_the_cpu(
    run: Callable[..., TrainResult], dataset: EncodedDataset, tiny: Model, tmp_path: Path
) -> None:
    result = run(dataset, device="cuda")
    assert {p.device.type for p in tiny.components.denoiser.parameters()} == {"cpu"}
    assert all(t.device.type == "cpu" for one in result.lora.state.adapters.values() for t in one.tensors.values())
    Lora.load(result.lora.save(tmp_path / "lora.safetensors"), tiny)


@pytest.mark.parametrize("bypass", [False, True])
def test_pictures_come_from_the_gpu(
    run: Callable[..., TrainResult], dataset: EncodedDataset, tiny: Model, bypass: bool
) -> None:
    lora = run(dataset, device="cuda").lora
    (image,) = generate(lora.applied_to(tiny.denoiser, bypass=bypass), "a cat", steps=2)
    assert image.size == (64, 64)


@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("kind", PACKINGS)
def test_quantized_and_offloaded_weights_agree_with_the_cpus(
    run: Callable[..., TrainResult], mixed: EncodedDataset, kind: str, offloading: bool
) -> None:
    settings: dict[str, Any] = {"quantization": kind, "batch_size": 3, "gradient_checkpointing": True}
    on_cpu = run(mixed, device="cpu", **settings)
    on_gpu = run(mixed, device="cuda", offloading=offloading, **settings)
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in PACKINGS if kind.startswith("fp8")])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_products_in_fp8_agree_with_those_of_the_unpacked_weights(
    run: Callable[..., TrainResult], mixed: EncodedDataset, kind: str, dtype: str
) -> None:
    if not has_fp8_products(torch.device("cuda")):
        pytest.skip("needs compute capability 8.9")
    settings: dict[str, Any] = {"quantization": kind, "batch_size": 3, "training_dtype": dtype, "device": "cuda"}
    plain, fp8 = (run(mixed, quantized_backward=wanted, **settings) for wanted in (False, True))
    assert fp8.losses != plain.losses
    assert fp8.losses == pytest.approx(plain.losses, rel=0.03)


@pytest.mark.parametrize("kind", [kind for kind in PACKINGS if kind.startswith("fp8")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_product_in_fp8_is_the_cpus(kind: str, dtype: torch.dtype, rows: int) -> None:
    device = torch.device("cuda")
    if not has_fp8_products(device):
        pytest.skip("needs compute capability 8.9")
    generator = torch.Generator().manual_seed(0)
    weight = packed(torch.randn(320, 768, generator=generator), kind, dtype)
    x, grad = (torch.randn(rows, size, generator=generator).to(dtype) for size in (768, 320))
    products, there = Fp8Products(), weight.to(device, dtype)
    for found, expected in (
        (products.forward(there, x.to(device), None), products.forward(weight, x, None)),
        (products.backward(there, grad.to(device)), products.backward(weight, grad)),
    ):
        assert found.dtype == dtype
        assert (found.cpu().float() - expected.float()).norm() <= 0.02 * expected.float().norm()


@pytest.mark.parametrize("kind", ["lean", "selective", "host", "auto"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_that_are_not_kept_change_no_bit(
    run: Callable[..., TrainResult], mixed: EncodedDataset, small_is_worth_it: None, kind: str, dtype: str
) -> None:
    settings: dict[str, Any] = {"batch_size": 3, "training_dtype": dtype, "device": "cuda", "deterministic": True}
    assert run(mixed, activations=kind, **settings).losses == run(mixed, **settings).losses


@pytest.mark.parametrize(("kind", "share"), [("selective", 0.6), ("host", 0.6)])
def test_activations_that_are_not_kept_take_no_gpu_memory(kind: str, share: float) -> None:
    device = torch.device("cuda")
    nn = torch.nn
    blocks = [(nn.LayerNorm(512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(8)]
    net = nn.Sequential(*(nn.Sequential(*block) for block in blocks)).to(device)
    net.requires_grad_(False)
    x = torch.randn(4096, 512, device=device, requires_grad=True)
    held = {}
    for one in ("keep", kind):
        before = torch.cuda.memory_allocated()
        with activations.sparing(net, one), activations.economical(one, net):
            y = net(x)
        torch.cuda.synchronize()
        held[one] = torch.cuda.memory_allocated() - before
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert grad.isfinite().all()
        del y, grad
    assert held[kind] < share * held["keep"]


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.3), ("nf4", 0.2)])
def test_a_gpu_holds_codes_alone(tiny: Model, kind: str, share: float) -> None:
    module, device = tiny.components.denoiser, torch.device("cuda")
    plain = sum(parameter.numel() * 4 for parameter in module.parameters())
    before = torch.cuda.memory_allocated()
    with kept(module, kind=kind, device=device, dtype=torch.float32) as parameters:
        assert {parameter.device.type for parameter in parameters} == {"cuda"}
        assert torch.cuda.memory_allocated() - before < share * plain
    assert torch.cuda.memory_allocated() - before < 0.01 * plain


def test_a_stream_stays_within_a_few_layers_while_the_gpu_lags_behind() -> None:
    device, count, size = torch.device("cuda"), 64, 4 * 1024 * 1024
    stream = WeightStream(device)
    for number in range(count):
        stream.add(packed(torch.full((1024, 1024), float(number)), "none", torch.float32))
    stream.ahead_bytes = 2 * size
    x = torch.randn(8192, 1024, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for number in range(count):
            weight = stream.fetch(number).weight()
            y = x @ weight
            assert number % 16 or torch.equal(weight.mean().cpu(), torch.tensor(float(number)))
            del weight, y
    assert torch.cuda.max_memory_allocated() - before < 12 * size + 2 * x.numel() * 4


@pytest.mark.skipif(compiler(torch.device("cuda")) == "none", reason="needs triton")
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True, "checkpoint_depth": 2}, {"quantization": "int8"}, {"rank_dropout": 0.3}],
    ids=lambda settings: next(iter(settings), "plain"),
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_compiled_blocks_give_the_same_losses(
    run: Callable[..., TrainResult], dataset: EncodedDataset, settings: dict[str, Any], dtype: str, tolerance: float
) -> None:
    heard: list[Event] = []
    common: dict[str, Any] = {"training_dtype": dtype, "batch_size": 2, "device": "cuda", **settings}
    compiled = run(dataset, compile=True, on_event=heard.append, **common)
    assert not [event.message for event in heard if isinstance(event, Warned) and "compile" in event.message]
    assert compiled.losses == pytest.approx(run(dataset, **common).losses, rel=tolerance)


@pytest.mark.skipif(compiler(torch.device("cuda")) == "none", reason="needs triton")
def test_compiled_blocks_take_mixed_sizes(run: Callable[..., TrainResult], mixed: EncodedDataset) -> None:
    settings: dict[str, Any] = {"batch_size": 3, "device": "cuda"}
    assert run(mixed, compile=True, **settings).losses == pytest.approx(run(mixed, **settings).losses, rel=1e-3)


@pytest.mark.skipif(compiler(torch.device("cuda")) == "none", reason="needs triton")
def test_compiled_runs_are_the_same_to_the_bit(run: Callable[..., TrainResult], dataset: EncodedDataset) -> None:
    settings: dict[str, Any] = {"compile": True, "deterministic": True, "device": "cuda", "batch_size": 2}
    assert run(dataset, **settings).losses == run(dataset, **settings).losses


def test_streamed_weights_are_not_compiled_aloud(tiny: Model) -> None:
    job = plan_job(tiny.denoiser, TrainConfig(compile=True, offloading=True, rank=2), torch.device("cuda"))
    assert any("compile changes nothing with offloading" in note for note in job.notes)
