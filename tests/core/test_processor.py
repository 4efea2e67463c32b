"""Threads that sleep while they wait, and as many as there are free processors. Nothing is measured here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lorasmith.cli import main as command_line
from lorasmith.core import processor
from lorasmith.core.processor import (
    busy_processors,
    has_no_gpu,
    let_threads_sleep,
    processor_name,
    slowdown_beside,
    threads_beside,
    usable_processors,
)
from tests.launched import environment

_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _NAMES:
        monkeypatch.setenv(name, "")  # so that the value is restored
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "1"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_sleep_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: dict[str, str]
) -> None:
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    let_threads_sleep()
    assert {name: os.environ[name] for name in _NAMES if name in os.environ} == after


@pytest.mark.usefixtures("unset")
def test_the_command_line_lets_them_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("keep_freed_memory", "other_output_made_printable", "app"):
        monkeypatch.setattr(command_line, name, lambda: None)
    monkeypatch.setattr(command_line.atexit, "register", lambda function: None)
    command_line.main()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_programs_start_without_torch_which_reads_it_once() -> None:
    code = "import sys, lorasmith.cli.main, lorasmith.runs.worker; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_a_thread_for_each_free_processor() -> None:
    for most, busy, threads in [
        (2, 0.2, 2),
        (2, 1.0, 1),
        (2, 2.0, 1),
        (2, 8.0, 1),
        (1, 1.0, 1),
        (16, 2.1, 14),
        (16, 7.0, 9),
        (16, 16.0, 8),
    ]:
        assert threads_beside(most, busy) == threads


@pytest.mark.parametrize(
    ("processors", "busy", "times"), [(2, 0.4, 1.0), (2, 1.0, 2.0), (2, 2.0, 3.0), (8, 2.0, 4 / 3)]
)
def test_a_run_takes_longer_on_fewer_threads_and_on_a_share_of_a_processor(
    processors: int, busy: float, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "usable_processors", lambda: processors)
    assert slowdown_beside(busy) == pytest.approx(times)


def test_busy_are_others_on_the_processors_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, own = iter((10.0, 10.5)), iter((3.0, 3.25))
    clocks = SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(own))
    monkeypatch.setattr(processor, "time", clocks)
    monkeypatch.setattr(processor, "_usable", lambda: [0, 2, 9])
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: [90.0, 100.0, 80.0, 100.0])
    assert busy_processors(0.5) == pytest.approx(1.7 - 0.5)


@pytest.mark.parametrize(("quota", "processors"), [("150000 100000", 2), ("max 100000", 8), ("9000000 100000", 8)])
def test_a_container_has_a_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, processors: int) -> None:
    monkeypatch.setattr(processor, "_usable", lambda: list(range(8)))
    monkeypatch.setattr(processor, "_QUOTA", tmp_path / "cpu.max")
    assert usable_processors() == 8, "there is no such file"
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_processors() == processors


@pytest.mark.parametrize(
    ("system", "vendors", "alone"),
    [
        ("linux", ["0x8086", "0x1af4"], True),
        ("linux", ["0x8086", "0x10de"], False),
        ("linux", None, False),
        ("darwin", ["0x8086"], False),
    ],
)
def test_a_machine_that_surely_has_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, vendors: list[str] | None, alone: bool
) -> None:
    for index, vendor in enumerate(vendors or []):
        (tmp_path / "devices" / str(index)).mkdir(parents=True)
        (tmp_path / "devices" / str(index) / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(processor, "_PCI", tmp_path / "devices")
    monkeypatch.setattr(processor, "_WSL_GPU", tmp_path / "dxg")
    monkeypatch.setattr(processor.sys, "platform", system)
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    assert has_no_gpu() is alone


def test_the_processor_has_a_name() -> None:
    assert processor_name().partition(", ")[0]
