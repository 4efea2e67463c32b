"""What is measured of a step: counts that do not depend on the machine, and the words for what limits it."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lorasmith.bench.benchmark import Measured, Rates, latent_side, limits, shares
from lorasmith.bench.measure import (
    Counter,
    Counts,
    PartTimes,
    Profile,
    Spread,
    counted,
    frozen_floor,
    measured_steps,
    pass_seconds,
    profiled,
    synthetic_samples,
    training_steps,
    weight_bytes,
)
from lorasmith.core.errors import OptionError
from lorasmith.families.model import Model
from lorasmith.training.batches import Batch, BatchMaker
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.trainable import trainable

CPU = torch.device("cpu")


def planned(tiny: Model, **settings: Any) -> TrainJob:
    base = {"steps": 4, "batch_size": 2, "rank": 4, "training_dtype": "fp32", "targets": "attention"}
    return plan_job(tiny.denoiser, TrainConfig(**(base | settings)), CPU)


def counts_of(tiny: Model, **settings: Any) -> Counts:
    job = planned(tiny, **settings)
    samples = synthetic_samples(tiny, 2, 8, 8)
    return counted(lambda counter: training_steps(job, samples, counter), CPU)


@pytest.mark.parametrize("kind", ["slider", "dpo"])
def test_steps_on_pairs_are_measured(tiny: Model, kind: str) -> None:
    samples = synthetic_samples(tiny, 2, 8, 8, are_pairs=True)
    with training_steps(planned(tiny, pairs=kind), samples) as step:
        step()


def test_bytes_are_followed_until_they_are_gone() -> None:
    weight = torch.randn(16, 16)
    counter = Counter(CPU)
    with counter:
        x = torch.ones(8, 16) @ weight.t()  # the transposed weight is a view, and the ones are gone
        assert counter.live == x.nbytes
        y = x.view(16, 8)
    assert counter.peak == x.nbytes + 8 * 16 * 4
    assert counter.flops == 2 * 8 * 16 * 16
    assert counter.operations == 2
    del x
    assert counter.live == y.nbytes
    del y
    assert counter.live == 0


def test_flops_are_those_of_torchs_own_counter_and_of_attention_on_the_cpu() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3)
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    counter = Counter(CPU)
    with FlopCounterMode(display=False) as theirs, counter:
        F.conv2d(x, weight).sum().backward()
    assert counter.flops == theirs.get_total_flops() > 0
    counter.reset()
    with counter:
        y = F.scaled_dot_product_attention(q, q, q)
    product = 2 * 2 * 16 * 16 * 8
    assert counter.flops == 2 * product
    with counter:
        y.sum().backward()
    assert counter.flops == 2 * product + 5 * product


def test_what_a_step_keeps_is_what_autograd_saves(tiny: Model) -> None:
    job = planned(tiny)
    samples = synthetic_samples(tiny, 2, 8, 8)
    counts = counted(lambda counter: training_steps(job, samples, counter), CPU)
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # a storage that is gone would give its place to another
    with training_steps(job, samples) as once:
        once()
        weights = [*tiny.denoiser.module.parameters(), *(p for one in job.adapters.values() for p in one.parameters())]
        frozen = {weight.untyped_storage().data_ptr() for weight in weights}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                saved[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            once()
    assert counts.held == pytest.approx(sum(saved.values()), rel=0.02)
    assert counts.peak > counts.state + counts.held
    # fp32 weights, gradients, and the two moments of AdamW
    assert counts.state == pytest.approx(16 * job.parameters, rel=0.1)


def test_the_floor_is_the_frozen_model_and_leaves_it_alone(tiny: Model) -> None:
    samples = synthetic_samples(tiny, 2, 8, 8)
    before = [(p.data_ptr(), p.stride(), p.requires_grad) for p in tiny.denoiser.module.parameters()]

    @contextlib.contextmanager
    def floor(counter: Counter) -> Iterator[Any]:
        with frozen_floor(trainable(tiny), samples, device=CPU, dtype=torch.float32) as once:
            assert all(p.is_contiguous() for p in tiny.denoiser.module.parameters())
            yield once

    counts = counted(floor, CPU)
    assert [(p.data_ptr(), p.stride(), p.requires_grad) for p in tiny.denoiser.module.parameters()] == before
    assert counts.state == 0
    # The first layers of a step need no gradient, those of the floor do.
    assert counts_of(tiny).flops == pytest.approx(counts.flops, rel=0.05)
    assert counts_of(tiny, targets="all").flops > counts.flops


def test_seconds_are_of_the_steps_behind_the_warm_up(tiny: Model) -> None:
    job = planned(tiny, steps=5)
    spread = measured_steps(job, synthetic_samples(tiny, 2, 8, 8), warmup=2).seconds
    assert len(spread.seconds) == 3
    assert 0 < spread.low <= spread.median <= spread.high
    calls: list[int] = []
    assert len(pass_seconds(lambda: calls.append(1), steps=2, warmup=3, device=CPU).seconds) == 2
    assert len(calls) == 5


def test_weights_are_counted_as_they_are_kept_and_sizes_are_those_of_latents(tiny: Model) -> None:
    module = tiny.denoiser.module
    whole = weight_bytes(module)
    assert whole == sum(p.nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())
    for kind, share in {"int8": 0.25, "nf4": 0.14}.items():
        job = planned(tiny, quantization=kind)
        with training_steps(job, synthetic_samples(tiny, 2, 8, 8)):
            assert weight_bytes(module) == pytest.approx(share * whole, rel=0.15)
    assert weight_bytes(module) == whole
    assert latent_side(tiny, None) == 16
    assert latent_side(tiny, 32) == 8
    with pytest.raises(OptionError, match=r"must be a multiple of 16 for this model, got 40; use (32|48)"):
        latent_side(tiny, 40)


def test_a_profile_tells_products_from_others() -> None:
    a, b = torch.randn(600, 600), torch.randn(1000, 1000)
    product = profiled(lambda: [a @ a for _ in range(4)] and None, CPU)
    others = profiled(lambda: [b.exp() for _ in range(4)] and None, CPU)
    assert product.products > 5 * product.others
    assert others.others > 5 * others.products
    assert next(iter(others.longest)) == "aten::exp"
    assert product.products + product.others + product.between == pytest.approx(product.whole)


def test_the_time_that_steps_wait_for_their_batches_is_measured(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    now, reads = 0.0, 0
    third_waits = threading.Event()
    make = BatchMaker.step

    def clock() -> float:
        nonlocal reads
        reads += 1
        if reads == 5:  # once before and once after each step's wait
            third_waits.set()
        return now

    def late(maker: BatchMaker, step: int) -> list[Batch]:
        nonlocal now
        if step == 2:
            assert third_waits.wait(600)
            now += 5
        return make(maker, step)

    monkeypatch.setattr(BatchMaker, "step", late)
    monkeypatch.setattr("lorasmith.training.loop.time", SimpleNamespace(perf_counter=clock))
    ends = itertools.count(step=10)
    found = measured_steps(planned(tiny), synthetic_samples(tiny, 2, 8, 8), warmup=1, clock=lambda: next(ends))
    assert found.seconds.seconds == (10, 10, 10)
    assert found.waited.seconds == (0, 5, 0)
    assert found.waiting == 5 / 30


COUNTS = Counts(flops=10**9, operations=1000, sent=0, held=2**20, peak=2**21, state=2**19)
SOUND = Measured(
    plan=None,
    step=Spread((1.0, 1.0, 1.1)),
    waited=Spread((0.0, 0.0, 0.1)),
    images=2,
    parts=PartTimes(making=0.01, gradient=0.98, update=0.02, busy=1.0),
    counts=COUNTS,
    profile=Profile(whole=1.0, products=0.8, others=0.15, longest={"aten::mm": 0.8}),
    floor=Spread((0.8,)),
    floor_counts=replace(COUNTS, flops=9 * 10**8),
    forward=Spread((0.3,)),
    passes=1,
    weights=2**30,
    above=2**21,
    peak=2**30,
    memory=2**33,
    rates=Rates(products=1.5e9, copies=None),
)


@pytest.mark.parametrize(
    ("change", "first", "words"),
    [
        ({}, "Products, 80%", r"at 83% of the 2 GFLOP/s"),
        ({"rates": Rates(1e11, None)}, "Products", "small or narrow"),
        ({"floor_counts": replace(COUNTS, flops=6 * 10**8)}, "Products", "40% of them are not in the floor"),
        ({"profile": Profile(1.0, 0.1, 0.8, {"aten::add": 0.8})}, "Other operations, 80%", "aten::add 800.0 ms"),
        ({"profile": Profile(1.0, 0.1, 0.2, {})}, "Between operations, 70%", "launching 1,000 operations"),
        ({"waited": Spread((0.4, 0.5, 0.34))}, "Products", r"Waiting for batches, 40%: making one takes 10\.0 ms"),
        ({"parts": PartTimes(0.0, 0.5, 0.2, 0.5)}, "Products", r"The optimizer, 20%[\s\S]*cores are busy for 50%"),
        ({"counts": replace(COUNTS, sent=2**30), "rates": Rates(1e9, 2.0**31)}, "Products", "takes 50% of its time"),
        ({"memory": 2**30}, "Products", "Memory is near its limit: 100%"),
    ],
)
def test_what_limits_a_step_is_said(change: dict[str, Any], first: str, words: str) -> None:
    found = replace(SOUND, **change)
    said = limits(found)
    assert said[0].startswith(first)
    assert re.search(words, "\n".join(said))
    assert sum(one.of_step for one in shares(found)) == pytest.approx(1)


def test_nothing_is_said_that_does_not_hold() -> None:
    text = "\n".join(limits(SOUND))
    for words in (
        "Waiting",
        "optimizer,",
        "Transfers",
        "near its limit",
        "processors",
        "not in the floor",
        "narrow",
    ):
        assert words not in text
    assert SOUND.waiting == pytest.approx(0.1 / 3.1)
    assert SOUND.images_per_hour == 7200
    assert SOUND.of_floor == pytest.approx(0.8)
    assert replace(SOUND, passes=2, images=4).images_per_hour == 14400
