"""What a GPU holds during a run, by its allocator: copies, codes, streamed weights, activations, what was planned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lever_cases import flux_dataset
from torch import nn

from lorasmith.adapters.frozen_weights import weights_packed
from lorasmith.adapters.weight_stream import WeightStream
from lorasmith.core.placement import placed
from lorasmith.core.quantization import PACKINGS, packed
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training.events import Event, Planned, Shrunk
from lorasmith.training.memory import activations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")


class Peak:
    """Bytes of GPU memory above those at the beginning, at the most; what libraries keep is there before."""

    size_bytes: int


@contextlib.contextmanager
def peak() -> Iterator[Peak]:
    layer = nn.Linear(64, 64, device=DEVICE)
    layer(torch.ones(64, 64, device=DEVICE, requires_grad=True)).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found, before = Peak(), torch.cuda.memory_allocated()
    yield found
    torch.cuda.synchronize()
    found.size_bytes = torch.cuda.max_memory_allocated() - before


@pytest.fixture(scope="module")
def large_pictures() -> EncodedDataset:
    """Latents of 96×96 for the small Flux.1: 2304 tokens each."""
    g = torch.Generator().manual_seed(0)
    return EncodedDataset(
        tuple(
            Sample(torch.randn(16, 96, 96, generator=g), sample.conditioning, sample.name)
            for sample in flux_dataset().samples
        )
    )


def test_copies_stand_in_for_weights_and_are_gone_afterwards(tiny: Model) -> None:
    module = tiny.components.denoiser
    originals = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.state_dict().items()}
    before = torch.cuda.memory_allocated()
    with placed(module, device=DEVICE, dtype=torch.bfloat16):
        assert {one.device.type for one in module.parameters()} == {DEVICE.type}
        assert {one.dtype for one in module.parameters()} == {torch.bfloat16}
        kernels = [one for one in module.parameters() if one.ndim == 4 and min(one.shape[1:]) > 1]
        assert kernels
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in kernels)
    assert torch.cuda.memory_allocated() == before
    for name, tensor in module.state_dict().items():
        place, bits = originals[name]
        assert tensor.data_ptr() == place
        assert torch.equal(tensor, bits)


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_are_the_cpus(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = packed(weight, kind, dtype), packed(weight.to(DEVICE), kind, dtype)
    same = on_cpu.weight() == on_gpu.weight().cpu()
    assert same.float().mean() > 0.999  # a number halfway between two codes may go either way


@pytest.mark.parametrize(("kind", "share"), [("selective", 0.6), ("host", 0.6)])
def test_activations_that_are_not_kept_take_no_gpu_memory(kind: str, share: float) -> None:
    blocks = [(nn.LayerNorm(512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(8)]
    net = nn.Sequential(*(nn.Sequential(*block) for block in blocks)).to(DEVICE)
    net.requires_grad_(False)
    x = torch.randn(4096, 512, device=DEVICE, requires_grad=True)
    held = {}
    for one in ("keep", kind):
        before = torch.cuda.memory_allocated()
        with activations.activations_reduced(net, one), activations.activations_packed(one, net):
            y = net(x)
        torch.cuda.synchronize()
        held[one] = torch.cuda.memory_allocated() - before
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert grad.isfinite().all()
        del y, grad
    assert held[kind] < share * held["keep"]


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.3), ("nf4", 0.2)])
def test_a_gpu_holds_codes_alone(tiny: Model, kind: str, share: float) -> None:
    module = tiny.components.denoiser
    plain = sum(parameter.numel() * 4 for parameter in module.parameters())
    before = torch.cuda.memory_allocated()
    with weights_packed(module, kind=kind, device=DEVICE, dtype=torch.float32) as parameters:
        assert {parameter.device.type for parameter in parameters} == {"cuda"}
        assert torch.cuda.memory_allocated() - before < share * plain
    assert torch.cuda.memory_allocated() - before < 0.01 * plain


def test_a_stream_has_two_buffers_while_the_gpu_lags_behind() -> None:
    count, size = 64, 4 * 1024 * 1024
    stream = WeightStream(DEVICE)
    sources = [
        stream.add([packed(torch.full((1024, 1024), float(number)), "none", torch.float32)])[0]
        for number in range(count)
    ]
    x = torch.randn(8192, 1024, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for number, source in enumerate(sources):
            with source.use() as sent:
                y = x @ sent.weight()
                mean = sent.weight().mean()
            assert number % 16 or torch.equal(mean.cpu(), torch.tensor(float(number)))
            del y
    assert torch.cuda.max_memory_allocated() - before < 3 * size + 2 * x.numel() * 4


def test_offloaded_weights_are_not_on_the_device() -> None:
    width, count = 1024, 24
    module = nn.Sequential(
        nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, width)) for _ in range(count))
    ).requires_grad_(False)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    stream = WeightStream(DEVICE)
    x = torch.randn(64, width, device=DEVICE, requires_grad=True)
    with (
        peak() as most,
        weights_packed(module, kind="none", device=DEVICE, dtype=torch.float32, stream=stream) as looked_after,
        placed(module, device=DEVICE, dtype=torch.float32, without=looked_after),
    ):
        for _ in range(3):
            y = x
            for block in module[0]:
                y = block(y)
            torch.autograd.grad(y.square().mean(), x)
        assert stream.size_bytes < weights / 8
    assert most.size_bytes < weights / 3


@pytest.mark.parametrize("budget", [None, 0.01], ids=["room for all", "room for nothing"])
def test_a_step_needs_what_was_planned(flux: Model, large_pictures: EncodedDataset, budget: float | None) -> None:
    heard: list[Event] = []
    settings: dict[str, Any] = {"steps": 3, "rank": 4, "batch_size": 4, "training_dtype": "bf16", "learning_rate": 1e-4}
    with peak() as most:
        train(
            flux,
            large_pictures,
            device=DEVICE,
            activations="auto",
            memory_budget=budget,
            on_event=heard.append,
            **settings,
        )
    (plan,) = [event for event in heard if isinstance(event, Planned)]
    assert (plan.activations, bool(plan.checkpoint_depth)) == ("keep", budget is not None)
    assert not [event for event in heard if isinstance(event, Shrunk)]
    weights = 2 * sum(parameter.numel() for parameter in flux.components.denoiser.parameters())
    assert 0.4 * plan.needed_bytes < most.size_bytes - weights < 1.15 * plan.needed_bytes + 2**25


def test_where_memory_runs_out_a_step_is_taken_in_pieces(flux: Model, large_pictures: EncodedDataset) -> None:
    settings: dict[str, Any] = {"steps": 3, "rank": 4, "batch_size": 4, "training_dtype": "bf16", "learning_rate": 1e-4}
    with peak() as most:
        whole = train(flux, large_pictures, device=DEVICE, **settings)
    heard: list[Event] = []
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + int(0.75 * most.size_bytes)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(DEVICE).total_memory)
    try:
        pieces = train(flux, large_pictures, device=DEVICE, on_event=heard.append, **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [event for event in heard if isinstance(event, Shrunk)]
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-2)
