from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from lorasmith.runs.sweep_group import GroupProcess, grouped, train_group

from lorasmith.runs import sweep_group
from lorasmith.runs.sweep_file import Sweep, SweepRun, read_sweep
from lorasmith.runs.sweep_run import RunEnd, end_of, log_of, sweep_folder
from tests.runs.folder_cases import pictures
from tests.runs.sweep_cases import sweep_of

posix = pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for Python")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return sweep_of(tmp_path)


def names(groups: list[tuple[SweepRun, ...]]) -> list[list[int]]:
    return [[run.number for run in group] for group in groups]


def test_groups_have_what_is_of_the_model_in_common(tmp_path: Path) -> None:
    rates = "learning_rate = [1e-4, 2e-4, 3e-4]\n"
    assert names(grouped(sweep_of(tmp_path, rates).runs, 2)) == [[1, 2], [3]]
    quantized = sweep_of(tmp_path, 'quantization = ["none", "nf4"]\n' + rates)
    assert names(grouped(quantized.runs, 8)) == [[1, 2, 3], [4, 5, 6]]
    assert names(grouped(quantized.runs, 2)) == [[1, 2], [3], [4, 5], [6]]
    interleaved = sweep_of(tmp_path, rates + 'quantization = ["none", "nf4"]\n')
    assert names(grouped(interleaved.runs, 2)) == [[1, 3], [2, 4], [5], [6]]
    assert names(grouped(sweep_of(tmp_path, "compile = [true]\n" + rates).runs, 3)) == [[1], [2], [3]]


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\ncat > given.json\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sweep_group, "_COMMAND", (str(path),))
    monkeypatch.chdir(tmp_path)


def ended(process: GroupProcess) -> RunEnd:
    until = time.monotonic() + 60
    while (end := process.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return end


@posix
def test_each_run_s_end_is_told_and_a_process_that_dies_ends_those_that_are_left(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, runs = sweep_folder(tmp_path / "out"), sweep.runs[:2]
    done = output / "logs" / f"{runs[1].name}.json"
    stand_in(tmp_path, monkeypatch, f"echo '{{\"exit_code\": 0}}' > {done}; echo Segfault >&2; exit 3")
    told: dict[str, RunEnd] = {}
    process = GroupProcess(runs, output, "cpu", on_end=lambda run, end: told.update({run.name: end}))
    assert ended(process) == RunEnd(exit_code=3)
    assert told[runs[1].name] == RunEnd(exit_code=0)
    assert told[runs[0].name] == end_of(output, runs[0])
    assert told[runs[0].name].error.endswith(f"exit code 3; {runs[0].name}.txt ends with: Segfault")
    assert '"device": "cpu"' in (tmp_path / "given.json").read_text()
    for run in runs:
        assert log_of(output, run).read_text().startswith(f"$ lorasmith train {tmp_path / 'photos'} ")


@posix
def test_runs_that_are_stopped_have_no_error(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, runs = sweep_folder(tmp_path / "out"), sweep.runs[:2]
    stand_in(tmp_path, monkeypatch, "trap 'exit 143' TERM; echo ready >&2; while :; do sleep 0.05; done")
    process = GroupProcess(runs, output)
    while "ready" not in log_of(output, runs[0]).read_text():
        time.sleep(0.01)
    process.stop()
    assert ended(process) == RunEnd(exit_code=143)
    assert [end_of(output, run) for run in runs] == [RunEnd(exit_code=143)] * 2


@pytest.mark.slow
def test_runs_train_together_and_one_without_images_fails_alone(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 4)
    (tmp_path / "empty").mkdir()
    sweep_of(tmp_path, "rank = [2, 4]\n")
    text = (tmp_path / "sweep.toml").read_text().replace('sources = "photos"\n', "")
    (tmp_path / "sweep.toml").write_text(text.replace("[grid]", '[grid]\nfolder = ["photos", "empty"]'))
    runs = read_sweep(tmp_path / "sweep.toml").runs
    output = sweep_folder(tmp_path / "out")
    train_group(runs, output, folders=None, cancelled=lambda: False)
    ends = [end_of(output, run) for run in runs]
    assert [end and end.exit_code for end in ends] == [0, 0, 1, 1], ends
    assert ends[2] is not None and "empty" in ends[2].error
    assert (output / runs[0].name / "cat.safetensors").is_file()
    assert "held out of training" in log_of(output, runs[1]).read_text()
