"""What a CUDA graph captures is on its stream and in its memory, and asks nothing of the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorasmith.training import cuda_graphs
from tests.covering import slow_except
from tests.cuda.cases import FAMILIES
from tests.cuda.conftest import FakeDevice
from tests.cuda.streams import Streams
from tests.cuda.test_steps import LEVERS
from tests.cuda.tracing import DEVICE, MODE, Devices, Traced, Watch, graphs_watched

CASES = [
    *((family, "plain", captions) for family in FAMILIES for captions in ("plain", "masked")),
    *(("flux1", lever, "plain") for lever in LEVERS if not lever.startswith(("offloading", "host", "plain"))),
]


@pytest.mark.parametrize(("family", "lever", "captions"), slow_except(CASES, ("flux1", "plain", "plain")))
def test_a_captured_pass_asks_nothing_of_the_host(device: FakeDevice, family: str, lever: str, captions: str) -> None:
    settings = dict(LEVERS[lever])
    settings["changes"] = {**settings.get("changes", {}), "cuda_graphs": True}
    found = device.traced(family, 1, is_masked=captions == "masked", steps=3, **settings)
    assert found.graphs == 1
    assert not found.captured
    assert not found.races
    assert not found.batches
    # Of the step that captures, which compares.
    assert all(wait.startswith("reads a value: training/cuda_graphs.py") for wait in found.waits)


def seen(run: Any) -> Counter[str]:
    """What is found in a capture of a function of the streams."""
    found, streams = Traced(), Streams()
    with streams.in_place(), graphs_watched(streams, found), Devices(MODE), MODE:
        stream = torch.cuda.Stream()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), (), stream, capture_error_mode="thread_local"):
            losses = run(torch.ones(4, device=DEVICE))
        del losses
    return Counter(text.partition(":")[0] for text in found.captured)


def test_what_does_not_belong_into_a_capture_is_found() -> None:
    cache = []

    def cached(x: torch.Tensor) -> torch.Tensor:
        cache.append(x + 1)
        return x * 2

    def elsewhere(x: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            return x * 2

    assert not seen(lambda x: x * 2)
    assert seen(lambda x: x * torch.ones(4).to(DEVICE, non_blocking=True)) == {"uses memory of the host (_to_copy)": 1}
    assert seen(elsewhere) == {"is on another stream (mul)": 1}
    assert seen(cached) == {"keeps memory of the graph": 1}


def test_all_graphs_of_a_process_are_captured_on_one_stream() -> None:
    """cuBLAS keeps a workspace for each stream, and a run makes graphs again after each preview."""
    streams = Streams()
    with streams.in_place(), graphs_watched(streams, Traced()), Devices(MODE), MODE:
        for _ in range(3):
            cuda_graphs.CudaGraphs(torch.ones(4, device=DEVICE))
    assert streams.count == 2  # with that of the start


@pytest.mark.parametrize(
    ("run", "refusal"),
    [
        (lambda x: x * torch.ones(4).to(DEVICE, non_blocking=True), "copies between the host and the GPU (_to_copy)"),
        (lambda x: x * torch.tensor(2.0).to(DEVICE), "copies between the host and the GPU (_to_copy)"),
        (lambda x: x.cpu(), "copies between the host and the GPU (_to_copy)"),
        (lambda x: x[torch.tensor([0])], "copies between the host and the GPU (index)"),
        (lambda x: x * float(x.sum()), "reads a value of the GPU on the host (_local_scalar_dense)"),
        (lambda x: x[torch.arange(2, device=DEVICE)] * torch.tensor(2.0), ""),
        (lambda x: x[: int(torch.ones(2).sum())].fill_(3.0), ""),
    ],
)
def test_what_no_graph_repeats_is_refused(run: Callable[[torch.Tensor], object], refusal: str) -> None:
    with Devices(MODE), MODE, Watch(Streams()):
        x = torch.ones(4, device=DEVICE)
        with (reads := cuda_graphs._Reads([])):
            run(x)
    assert reads.refusal == refusal


def test_what_fake_tensors_do_not_have_is_refused_as_well() -> None:
    with (reads := cuda_graphs._Reads([])):
        torch.tensor([1.0, 2.0], device="meta")
    assert reads.refusal == "copies between the host and the GPU (lift_fresh)"
    x, aten = torch.ones(4, device="meta"), torch.ops.aten
    for func, args in ((aten.nonzero.default, (x,)), (aten.index.Tensor, (x, [x > 0]))):
        assert cuda_graphs._refusal(func, args, {}, x) == f"reads a value of the GPU on the host ({func._opname})"
