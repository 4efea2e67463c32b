"""How long a LoRA takes: what was counted of each release, the rates of the machine, and the suggested model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorasmith.families.locating import BUILT_IN, ModelFiles, built_in_models
from lorasmith.runs import time_estimate
from lorasmith.runs.memory_estimate import MemoryEstimate
from lorasmith.runs.shelf import releases
from lorasmith.runs.time_estimate import DAY_S, EVENING_S, STEP_WORK, Rates, best_of, rates_of, work_of
from lorasmith.training import measured_times
from tools.step_work import work_counted


def test_the_table_has_every_release_and_what_is_counted_now(tiny_estimate: MemoryEstimate):
    assert set(STEP_WORK) == {BUILT_IN, *releases()}
    assert {STEP_WORK[name].family for name in releases()} == {family.title for family, _ in releases().values()}
    assert work_counted(ModelFiles(str(built_in_models()[BUILT_IN])), tiny_estimate) == STEP_WORK[BUILT_IN]


def test_sizes_that_were_not_counted_take_time_by_their_weights():
    counted = STEP_WORK["flux.2-klein-4b"]
    larger = work_of(counted.family, 2 * counted.weights)
    assert larger is not None
    assert larger.gflop == pytest.approx(2 * counted.gflop)
    assert work_of(counted.family) == counted
    assert work_of("a family of somebody's own") is None


def test_a_processor_computes_products_after_operations_and_a_gpu_beside_them():
    work = STEP_WORK["sd1.5"]
    products = Rates(0.001, 0.0, is_processor=True).step_s(work)
    assert Rates(0.001, 1e-3, is_processor=True).step_s(work) == pytest.approx(products + work.operations * 1e-3)
    assert Rates(0.001, 1e-3, is_processor=False).step_s(work) == max(products, work.operations * 1e-3)


def test_the_suggested_model_is_the_largest_of_an_evening_else_the_fastest_of_a_day():
    assert best_of([("a", 60, True), ("b", EVENING_S, True), ("c", DAY_S, True), ("d", 60, False)]) == "b"
    assert best_of([("a", EVENING_S + 1, None), ("b", DAY_S, None)]) == "a"
    assert best_of([("a", DAY_S + 1, True), ("b", None, True)]) is None


def test_rates_are_measured_here_as_in_a_process_of_their_own():
    time_estimate._rates_once.cache_clear()
    here = rates_of("cpu")
    command = [sys.executable, "-m", "lorasmith.runs.time_estimate", "cpu"]
    there = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert here is not None
    assert here.is_processor
    assert there.pop("busy") >= 0
    assert set(there) == {"gigaflop", "operation"}
    assert all(0 < one < 1 for one in (here.gflop_s, here.operation_s, *there.values()))


def test_rates_that_other_programs_slowed_down_are_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(measured_times, "_path", lambda: tmp_path / "times.json")
    seconds = iter([(0.02, 2e-5, 2.0), (0.01, 3e-5, 0.0), (0.001, 1e-6, 0.0)])
    times = (dict(zip(("gigaflop", "operation", "busy"), one, strict=True)) for one in seconds)
    monkeypatch.setattr(time_estimate, "_measured_here", lambda device: next(times))
    found = []
    for _ in range(3):  # processes
        time_estimate._rates_once.cache_clear()
        found.append(rates_of("cpu"))
    time_estimate._rates_once.cache_clear()
    assert found == [Rates(0.02, 2e-5, True), Rates(0.01, 2e-5, True), Rates(0.01, 2e-5, True)]
