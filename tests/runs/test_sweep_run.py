from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.runs import sweep_run
from lorasmith.runs.sweep_file import Sweep, SweepRun
from lorasmith.runs.sweep_run import (
    RunEnd,
    RunProcess,
    end_of,
    log_of,
    run_all,
    sweep_devices,
    sweep_folder,
    train_command,
)
from tests.launched import LONG_S
from tests.runs.sweep_cases import sweep_of

posix = pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for Python")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return sweep_of(tmp_path)


class Fake:
    """A run that ends after some looks at it, or once it is stopped."""

    def __init__(self, looks: int, code: int = 0) -> None:
        self.looks, self.code, self.stops = looks, code, 0

    def poll(self) -> RunEnd | None:
        self.looks -= 1
        return RunEnd(exit_code=self.code) if self.looks < 0 else None

    def stop(self) -> None:
        self.stops += 1
        self.looks = 0


class Stage:
    """Starts fakes, and remembers what ran where and beside what."""

    def __init__(self, looks: Callable[[SweepRun], int] = lambda run: 1) -> None:
        self.looks = looks
        self.running: dict[int, str | None] = {}
        self.started: list[tuple[int, str | None]] = []
        self.ended: list[int] = []
        self.fakes: dict[int, Fake] = {}

    def start(self, run: SweepRun, device: str | None) -> Fake:
        assert device not in self.running.values(), "one run at a time on each device"
        self.running[run.number] = device
        self.started.append((run.number, device))
        stage, fake = self, Fake(self.looks(run))

        class Watched(Fake):
            def poll(self) -> RunEnd | None:
                end = super().poll()
                if end is not None:
                    stage.running.pop(run.number, None)
                return end

        self.fakes[run.number] = Watched(fake.looks)
        return self.fakes[run.number]

    def end(self, run: SweepRun, end: RunEnd) -> None:
        self.ended.append(run.number)


def test_each_device_has_one_run_at_a_time_and_all_are_run(sweep: Sweep) -> None:
    stage = Stage(lambda run: 5 if run.number == 1 else 0)
    run_all(sweep.runs, ["a", "b"], stage.start, on_end=stage.end)
    assert stage.started == [(1, "a"), (2, "b"), (3, "b"), (4, "b")]
    assert sorted(stage.ended) == [1, 2, 3, 4] and stage.ended[-1] == 1


def test_a_stop_reaches_those_that_run_once_and_no_other_is_started(sweep: Sweep) -> None:
    stage = Stage(lambda run: 10**6)
    run_all(sweep.runs, ["a", "b"], stage.start, on_end=stage.end, cancelled=lambda: len(stage.started) == 2)
    assert (sorted(stage.ended), [fake.stops for fake in stage.fakes.values()]) == ([1, 2], [1, 1])


@pytest.mark.parametrize(("first_asked", "stops"), [(False, 1), (True, 2)])
def test_an_interruption_stops_them_and_waits(sweep: Sweep, first_asked: bool, stops: int) -> None:
    stage, looks = Stage(lambda run: 10**6), 0

    class Stubborn(Fake):
        def stop(self) -> None:
            self.stops += 1
            self.looks = 3 if self.stops == stops else self.looks

    def cancelled() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2 and not first_asked:
            raise KeyboardInterrupt
        return first_asked and looks == 2

    def started(run: SweepRun, device: str | None) -> Fake:
        fake = stage.fakes[run.number] = Stubborn(10**6)
        if first_asked:  # the second Ctrl-C, while they save
            polls = iter(range(10**6))

            def poll() -> RunEnd | None:
                if next(polls) == 3:
                    raise KeyboardInterrupt
                return Fake.poll(fake)

            fake.poll = poll  # type: ignore[method-assign]
        return fake

    with pytest.raises(KeyboardInterrupt):
        run_all(sweep.runs, ["a"], started, on_end=stage.end, cancelled=cancelled)
    assert (stage.ended, stage.fakes[1].stops) == ([1], stops)


def test_a_run_that_cannot_be_started_stops_the_others_first(sweep: Sweep) -> None:
    stage = Stage(lambda run: 10**6)

    def start(run: SweepRun, device: str | None) -> Fake:
        if run.number == 2:
            raise OutputError("no process")
        return stage.start(run, device)

    with pytest.raises(OutputError, match="no process"):
        run_all(sweep.runs, ["a", "b"], start, on_end=stage.end)
    assert stage.ended == [1] and stage.fakes[1].stops == 1


def test_the_command_of_a_run_is_that_of_train(sweep: Sweep, tmp_path: Path) -> None:
    run = sweep.runs[-1]
    command = train_command(run, tmp_path / "out", device="cpu", also=["--base-dir", "/models"])
    assert command[:2] == ["train", str(tmp_path / "photos")]
    pairs = dict(zip(command[2::2], command[3::2], strict=True))
    assert pairs == {
        "--model": "lorasmith-tiny", "--name": "cat", "--device": "cpu", "--resolution": "32", "--steps": "4",
        "--learning-rate": "0.0003", "--rank": "4", "--targets": "*.attn2.to_q", "--validation-share": "0.2",
        "--validation-draws": "2", "--previews": "", "--output": str(tmp_path / "out" / "rank-4_rate-3e-4"),
        "--base-dir": "/models",
    }  # fmt: skip
    assert "--device" not in train_command(run, tmp_path, device="cuda:1"), "the process sees one GPU"


def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A shell script in place of `python -m lorasmith`."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sweep_run, "LORASMITH", (str(path),))


def ended(process: RunProcess) -> RunEnd:
    until = time.monotonic() + LONG_S
    while (end := process.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return end


ERROR = '{"error": {"kind": "DataError", "message": "there is no usable image", "exit_code": 1}}'


@posix
@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("echo working >&2; echo '{}'", RunEnd(exit_code=0)),
        (f"echo '{ERROR}'; exit 1", RunEnd(exit_code=1, error="there is no usable image")),
        (
            "kill -9 $$",
            "ended with SIGKILL, as where the system has no memory left; rank-2_rate-1e-4.txt ends with: $ lora",
        ),
        ("echo one >&2; echo Segfault >&2; exit 3", "ended with exit code 3; rank-2_rate-1e-4.txt ends with: Segfault"),
        ("echo '[1]'; exit 2", "ended with exit code 2"),
    ],
)
def test_the_end_of_a_process_is_kept(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, end: RunEnd | str
) -> None:
    python(tmp_path, monkeypatch, script)
    output, run = sweep_folder(tmp_path / "out"), sweep.runs[0]
    process = RunProcess(run, output)
    found = ended(process)
    assert found == end if isinstance(end, RunEnd) else end in found.error
    assert process.poll() == end_of(output, run) == found
    assert log_of(output, run).read_text().startswith("$ lorasmith train ")


@posix
def test_a_process_that_is_stopped_has_no_error_and_is_forgotten_when_it_starts_again(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(tmp_path, monkeypatch, "trap 'exit 143' TERM; echo ready >&2; while :; do sleep 0.05; done")
    output, run = sweep_folder(tmp_path / "out"), sweep.runs[0]
    process = RunProcess(run, output)
    while "ready" not in log_of(output, run).read_text():
        time.sleep(0.01)
    assert process.poll() is None
    process.stop()
    assert ended(process) == end_of(output, run) == RunEnd(exit_code=143)
    python(tmp_path, monkeypatch, "sleep 0.2")
    again = RunProcess(run, output)
    assert end_of(output, run) is None
    ended(again)


@posix
def test_a_process_sees_the_gpu_of_its_device(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python(tmp_path, monkeypatch, 'echo "sees $CUDA_VISIBLE_DEVICES" >&2')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    output, run = sweep_folder(tmp_path / "out"), sweep.runs[0]
    for device, seen in (("cuda:1", "7"), ("cpu", "4,7"), (None, "4,7")):
        ended(RunProcess(run, output, device))
        assert log_of(output, run).read_text().endswith(f"sees {seen}\n")


@posix
def test_ctrl_c_of_a_terminal_does_not_reach_a_run_by_itself(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python(tmp_path, monkeypatch, 'echo "group $(ps -o pgid= -p $$)" >&2')
    output, run = sweep_folder(tmp_path / "out"), sweep.runs[0]
    ended(RunProcess(run, output))
    assert int(log_of(output, run).read_text().split()[-1]) != os.getpgrp()


def test_a_run_s_own_folder_is_no_folder_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    with pytest.raises(OutputError, match="holds a run itself; choose another"):
        sweep_folder(tmp_path)
    assert (sweep_folder(tmp_path / "new" / "one") / "logs").is_dir()


def test_devices_are_those_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert sweep_devices(None) == sweep_devices("cpu") == ("cpu",)
    with pytest.raises(OptionError, match=r"device must be one that is here \(cpu\), got 'cuda:0'"):
        sweep_devices("cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert sweep_devices(None) == sweep_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert sweep_devices("cpu") == ("cpu",)
    for wrong, sentence in {
        "cuda:0,cuda": "must name each device once",
        "cuda:2": "got 'cuda:2'",
        "gpu": "device must be one that is here",
        "": "device must be one",
    }.items():
        with pytest.raises(OptionError, match=sentence):
            sweep_devices(wrong)
