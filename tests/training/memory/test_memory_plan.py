"""Choosing how activations are kept: by measurement, the cheapest that fits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lever_cases import planned
from test_engine import assert_same, tensors
from torch import Tensor, nn

from lorasmith.adapters.weight_stream import WeightStream
from lorasmith.bench.measure import Counter
from lorasmith.core.processes import Processes
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from lorasmith.training import engine, planning
from lorasmith.training.events import Planned, Shrunk, Warned
from lorasmith.training.job import engine_of
from lorasmith.training.memory import memory_plan
from lorasmith.training.memory.activations import blocks_checkpointed
from lorasmith.training.memory.memory_plan import MemoryPlan, chosen_plan, free_memory
from lorasmith.training.results import TrainResult
from lorasmith.training.way import Way
from tests.covering import slow_except

Run = Callable[..., TrainResult]


pytestmark = pytest.mark.usefixtures("small_is_worth_it")


def plans(model: Model, data: EncodedDataset, budget: int) -> tuple[list[MemoryPlan], MemoryPlan]:
    job = planned(model, targets="all", activations="auto")
    trained = engine_of(job)
    with trained.frozen(), trained.adapted():
        batch = engine.batch_maker(job.model, data.samples, job.config, job.way).step(0)[0]
        run = functools.partial(model.denoiser.predict, batch.noised, batch.level.time, batch.conditioning)
        ladder = list(memory_plan._plans(model.components.denoiser, run, budget))
        return ladder, chosen_plan(job.model, data.samples, job.config, job.way, budget)


@pytest.mark.slow
def test_the_cheapest_that_fits_is_taken(tiny: Model, dataset: EncodedDataset) -> None:
    ladder, _ = plans(tiny, dataset, 0)
    assert [plan.activations for plan in ladder] == ["keep", "lean", "selective", "keep"]
    needs = [plan.needed_bytes for plan in ladder]
    assert needs == sorted(needs, reverse=True)
    assert [plan.checkpoint_depth > 0 for plan in ladder] == [False, False, False, True]
    for wanted in ladder:
        _, chosen = plans(tiny, dataset, int(wanted.needed_bytes / 0.9) + 2)
        assert (chosen.activations, chosen.checkpoint_depth) == (wanted.activations, wanted.checkpoint_depth)
        assert chosen.fits
    _, chosen = plans(tiny, dataset, 1)
    assert chosen.checkpoint_depth
    assert not chosen.fits
    assert "Memory may run out" in str(chosen)


class Chain(nn.Module):
    """Eight blocks, the last of which keeps more."""

    def __init__(self) -> None:
        super().__init__()
        widths = [*range(256, 256 + 7 * 32, 32), 640]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64)) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_no_more_blocks_are_recomputed_than_memory_needs() -> None:
    chain, x = Chain(), torch.randn(256, 64, requires_grad=True)
    probed = functools.partial(memory_plan._plans, chain, lambda: chain(x))
    keep, *_, whole = probed(0)
    kept = []
    for budget in range(whole.needed_bytes, keep.needed_bytes, whole.needed_bytes // 10):
        ladder = list(probed(budget))
        plan = next(one for one in ladder if one.checkpoint_depth and one.fits)
        assert len(ladder) == (5 if plan.kept_blocks > 1 else 4)
        kept.append(plan.kept_blocks)
        with blocks_checkpointed(chain, plan.checkpoint_depth, kept=plan.kept_blocks):
            chain(x).sum().backward()
            counter = Counter(x.device)
            with counter:
                chain(x).sum().backward()
        assert counter.peak <= plan.needed_bytes <= budget
    assert kept == sorted(kept)
    assert set(kept) == set(range(kept[0], 8))
    assert all(one.kept_blocks == 1 for one in probed(keep.needed_bytes))


def test_plans_are_in_the_order_of_their_time() -> None:
    chain, x = Chain(), torch.randn(256, 64, requires_grad=True)
    keep, *_, whole = memory_plan._plans(chain, lambda: chain(x), 0)
    places = set()
    for budget in range(whole.needed_bytes, keep.needed_bytes, whole.needed_bytes // 10):
        ladder = list(memory_plan._plans(chain, lambda: chain(x), budget))
        (found,) = [place for place, one in enumerate(ladder) if one.kept_blocks > 1] or [None]
        if found is not None:
            recomputed = 8 - ladder[found].kept_blocks
            assert found == (1 if recomputed < 2 else 2 if recomputed < 4 else 3)
            places.add(found)
            filled = budget
    assert places == {1, 2, 3}
    assert all(one.kept_blocks == 1 for one in memory_plan._plans(chain, lambda: chain(x), filled, fills=False))


def test_where_memory_runs_out_all_blocks_are_recomputed_first(
    quick_run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine.sample_losses

    def scarce(model: Any, batch: Any, config: Any, way: Way, *target: Any) -> Tensor:
        if way.kept_blocks > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, batch, config, way, *target)

    monkeypatch.setattr(engine, "sample_losses", scarce)
    monkeypatch.setattr(planning, "plan_for", lambda *_: MemoryPlan("keep", 1, 1, 2, kept_blocks=2))
    events: list[object] = []
    result = quick_run(dataset, batch_size=2, steps=1, activations="auto", on_event=events.append)
    assert_same(tensors(result), tensors(quick_run(dataset, batch_size=2, steps=1)))
    assert [event for event in events if isinstance(event, Planned) and "blocks but the last 2 are" in event.message]
    assert [event for event in events if isinstance(event, Warned) and "with all blocks recomputed" in event.message]
    assert not [event for event in events if isinstance(event, Shrunk)]


def test_a_probe_that_runs_out_of_memory_is_no_end(
    quick_run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> MemoryPlan:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(planning, "plan_for", broken)
    events: list[object] = []
    result = quick_run(dataset, activations="auto", on_event=events.append)
    assert_same(tensors(result), tensors(quick_run(dataset)), rtol=1e-3)
    assert any(isinstance(event, Warned) and "ran out while" in event.message for event in events)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Runs offload on the CPU, too; the blocks of the last one, and whether they were kept on the device."""
    made, kept, clear = Way.of, list[bool](), WeightStream.clear
    monkeypatch.setattr(Way, "of", lambda *args, **settings: replace(made(*args, **settings), offloading=True))

    def cleared(stream: WeightStream) -> None:
        kept[:] = [block.is_kept for block in stream._blocks]
        clear(stream)

    monkeypatch.setattr(WeightStream, "clear", cleared)
    return kept


# Blocks of 34.7 MB, two of which take 9.
@pytest.mark.parametrize("free", slow_except([0, 20 << 20, 1 << 40], 20 << 20))
def test_blocks_stay_where_a_step_leaves_memory_for_them(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, on_device: list[bool], free: int
) -> None:
    settings: dict[str, Any] = {"steps": 1, "gradient_checkpointing": True}
    expected = run(dataset, offloading=True, offloading_share=1.0, **settings).losses
    assert not any(on_device)
    monkeypatch.setattr(memory_plan, "free_memory", lambda *_: free)
    events: list[object] = []
    assert run(dataset, offloading=True, on_event=events.append, **settings).losses == expected
    assert (any(on_device), all(on_device)) == {0: (False, False), 20 << 20: (True, False), 1 << 40: (True, True)}[free]
    share = on_device.count(False) / len(on_device)
    assert [event for event in events if isinstance(event, Warned) and f"{share:.0%} of the blocks" in event.message]


def test_where_memory_runs_out_all_blocks_are_offloaded_first(
    run: Run, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, on_device: list[bool]
) -> None:
    original = engine.sample_losses

    def scarce(model: Any, batch: Any, config: Any, way: Way, *target: Any) -> Tensor:
        if way.offloading_share != 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, batch, config, way, *target)

    monkeypatch.setattr(engine, "sample_losses", scarce)
    events: list[object] = []
    run(dataset, batch_size=2, steps=1, offloading=True, on_event=events.append)
    assert [event for event in events if isinstance(event, Warned) and "with all blocks offloaded" in event.message]
    assert not [event for event in events if isinstance(event, Shrunk)]
    assert not any(on_device)


def test_the_pool_of_cuda_graphs_is_in_the_budget(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = engine_of(planned(tiny, targets="*.attn2.to_q"))
    monkeypatch.setattr(memory_plan, "free_memory", lambda *_: 1 << 30)
    without = memory_plan.free_bytes(trained)
    trained.way = replace(trained.way, cuda_graphs=True)
    assert memory_plan.free_bytes(trained) == without // 2


def test_the_budget_counts_what_is_taken_already() -> None:
    cpu = torch.device("cpu")
    free = free_memory(cpu)
    assert free > 0
    assert free_memory(cpu, 1 << 50) == pytest.approx(free, rel=0.2)
    assert free_memory(cpu, 1 << 20) < 0  # the program itself takes more


class LastOfFour(Processes):
    rank, size = 3, 4


@pytest.mark.parametrize(("batch_size", "accumulation", "measured"), [(1, 4, 1), (2, 4, 2), (4, 1, 1), (8, 1, 2)])
def test_one_of_several_processes_measures_a_batch_of_its_share(
    tiny: Model,
    dataset: EncodedDataset,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    accumulation: int,
    measured: int,
) -> None:
    job = planned(tiny, batch_size=batch_size, grad_accumulation_steps=accumulation)
    sizes: list[int] = []
    join = tiny.family.join
    monkeypatch.setattr(type(tiny.family), "join", lambda self, given: (sizes.append(len(given)), join(given))[1])
    way = replace(job.way, processes=LastOfFour())
    memory_plan.measured_plans(job.model, dataset.samples, job.config, way, 0)
    assert sizes == [measured]
