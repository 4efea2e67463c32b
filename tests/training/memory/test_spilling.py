"""Spilled memory is named once, with what to change, and a cap makes it an out-of-memory error."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorasmith.data.dataset import EncodedDataset
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Warned
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.loop import Loop
from lorasmith.training.memory import memory_plan, spilling
from lorasmith.training.memory.spilling import SpillCheck, may_spill, memory_capped
from lorasmith.training.step_results import Mailbox
from lorasmith.training.trainable import Trainable

GPU = torch.device("cuda", 0)
GIB = 2**30


class Card:
    """A GPU of 8 GiB as torch describes it."""

    free = 0.0
    reserved = 8.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shares: list[float] = []
        monkeypatch.setattr(spilling, "may_spill", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(self.free * GIB), 8 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(self.reserved * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * GIB))
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, device: self.shares.append(share)
        )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def warnings(seconds: list[float], *, size: object = "512") -> list[str]:
    check = SpillCheck(GPU)
    found = (check.warning(step, size, one) for step, one in enumerate(seconds, 1))
    return [one for one in found if one]


def test_a_slow_step_with_full_memory_is_named_once(card: Card) -> None:
    [text] = warnings([1.0] * 6 + [5.0, 5.0, 5.0])
    assert text.startswith("Step 7 took 5 s instead of 1 s with the GPU's memory full")
    assert "8.0 GiB of 8.0 GiB" in text
    assert "set memory_cap 7.2," in text


@pytest.mark.parametrize(("free", "reserved", "is_full"), [(0.1, 7, True), (1, 8.5, True), (1, 7, False)])
def test_memory_is_full_if_nothing_is_free_or_the_process_has_more_than_there_is(
    card: Card, free: float, reserved: float, is_full: bool
) -> None:
    card.free, card.reserved = free, reserved
    assert bool(warnings([1.0] * 6 + [5.0])) == is_full


def test_steps_of_usual_time_for_their_size_say_nothing(card: Card) -> None:
    assert warnings([1.0] * 6 + [1.9]) == warnings([1.0] * 4 + [5.0]) == []  # not twice; too few before
    check = SpillCheck(GPU)
    assert not any(check.warning(step, size, time) for step in range(9) for size, time in (("512", 1.0), ("1024", 4.0)))


def test_only_windows_and_linux_inside_of_it_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    monkeypatch.setattr(sys, "platform", "linux")
    assert not may_spill()
    assert SpillCheck(GPU).warning(1, "512", 1.0) is None  # asks no card
    monkeypatch.setattr(platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    assert may_spill()
    monkeypatch.setattr(sys, "platform", "win32")
    assert may_spill()


def test_a_cap_is_a_share_of_the_card_and_ends_with_the_run(card: Card) -> None:
    with memory_capped(GPU, None), memory_capped(torch.device("cpu"), 4 * GIB):
        assert card.shares == []
    with memory_capped(GPU, 6 * GIB), memory_capped(GPU, 4 * GIB):
        assert card.shares == [0.75, 0.5]
    assert card.shares[2:] == [0.75, 1.0]
    with memory_capped(GPU, 100 * GIB):
        assert card.shares[-1] == 1.0


def test_the_plan_of_activations_stays_below_the_cap(
    hand_made: Trainable, dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int | None] = []

    def free(device: torch.device, limit: int | None = None) -> int:
        limits.append(limit)
        return 8 * GIB

    monkeypatch.setattr(memory_plan, "free_memory", free)
    engine = engine_of(plan_job(hand_made, TrainConfig(rank=4, activations="auto", targets="*.attn2.to_q"), "cpu"))
    for budget, cap in ((None, None), (3 * GIB, None), (3 * GIB, 2 * GIB), (None, 2 * GIB)):
        engine.way = replace(engine.way, memory_budget=budget, memory_cap=cap)
        with engine.prepared():
            memory_plan.plan_for(engine, tuple(dataset))
    engine.release()
    assert limits == [None, 3 * GIB, 2 * GIB, 2 * GIB]


def test_a_run_says_that_it_is_spilled(
    hand_made: Trainable, dataset: EncodedDataset, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = Mailbox.collect

    def timed(box: Mailbox, **wanted: Any) -> list[tuple[int, list[float], float]]:
        return [(step, values, 9.0 if step >= 7 else 1.0) for step, values, _ in collect(box, **wanted)]

    monkeypatch.setattr(Mailbox, "collect", timed)
    engine = engine_of(plan_job(hand_made, TrainConfig(rank=4, steps=10, targets="*.attn2.to_q"), "cpu"))
    events: list[Event] = []
    samples = [dataset[0]]
    loop = Loop(engine, samples, on_event=events.append)
    loop._spilling = SpillCheck(GPU)
    loop.run()
    engine.release()
    messages = [one.message for one in events if isinstance(one, Warned)]
    assert len(messages) == 1
    assert messages[0].startswith("Step 8 took 9 s instead of 1 s")
