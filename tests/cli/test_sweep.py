"""Sweeps as people start them: refused, run, stopped, continued, and on a stand-in for Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.runs.sweep_file import Sweep
from tests.runs.folder_cases import pictures, tensors_of
from tests.runs.sweep_cases import ended_with, left_by, names_of, sweep_of

Command = Callable[..., Any]

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and shell scripts are others there")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    pictures(tmp_path / "photos", 4)
    return sweep_of(tmp_path, "learning_rate = [1e-4, 3e-4]\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--only", 3), "--only must be the number of a run, from 1 to 2, got 3"),
        (("--only", 0), "--only must be the number of a run, from 1 to 2, got 0"),
        (
            ("--launcher", "slurm", "--only", 1),
            "--launcher slurm decides where all runs are; leave --devices and --only",
        ),
        (("--launcher", "ray", "--devices", "cpu"), "--launcher ray decides where"),
        (("--launcher", "slurm", "--together", 2), "--together trains runs in one process"),
        (("--launcher", "slurm"), "needs the program sbatch, which is not on PATH"),
        (("--launcher", "slurm", "--slurm-options", "'"), "--slurm-options must be arguments as in a shell"),
        (("--devices", "cpu,cpu"), "--devices must name each device once"),
        (("--devices", "tpu"), "device must be one that is here"),
        (("--base-dir", "nowhere"), "--base-dir must be a folder, but nowhere does not exist"),
        (("--output", "photos/0.png"), "must be a folder but is a file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    lorasmith: Command, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, sentence: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = lorasmith("sweep", "sweep.toml", *arguments)
    assert (ran.code, sentence in ran.err) == (1, True), ran.err
    assert not list(tmp_path.rglob("events.jsonl"))


def test_a_file_without_held_out_images_is_refused(lorasmith: Command, sweep: Sweep, tmp_path: Path) -> None:
    text = (tmp_path / "sweep.toml").read_text().replace("validation_share = 0.2\n", "")
    (tmp_path / "sweep.toml").write_text(text)
    ran = lorasmith("sweep", "sweep.toml")
    assert (ran.code, "none are held out unless asked, got 4 in" in ran.err) == (1, True), ran.err
    assert not (tmp_path / "runs").exists()


def test_results_are_listed_and_nothing_is_started(lorasmith: Command, sweep: Sweep, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "sweep"
    left_by(sweep, names_of(sweep)[1], output, [0.9, 0.8])
    ran = lorasmith("sweep", "sweep.toml", "--list")
    assert ran.code == 0, ran.err
    table = [line.split() for line in ran.out.splitlines() if line.strip()]
    assert ["1", "0.8", "−20.0", "%", "2", "19", "s", str(Path("runs/sweep/rate-3e-4"))] in table
    assert ["1", "waiting", "rate-1e-4"] in table
    assert (output / "sweep.html").is_file() and not (output / "rate-1e-4").exists()

    ended_with(names_of(sweep)[0], output, "no memory")
    ran = lorasmith("sweep", "sweep.toml", "--list", "--json")
    found = json.loads(ran.out)
    assert ran.code == 1, "a run failed"
    assert [(one["name"], one["state"], one["place"], one["error"]) for one in found["runs"]] == [
        ("rate-3e-4", "complete", 1, ""), ("rate-1e-4", "failed", None, "no memory"),
    ]  # fmt: skip
    written = json.loads((output / "sweep.json").read_text())
    assert found == {"folder": str(output), "page": str(output / "sweep.html"), **written}


def test_a_sweep_that_is_complete_starts_nothing(lorasmith: Command, sweep: Sweep, tmp_path: Path) -> None:
    for run in sweep.runs:
        left_by(sweep, run, tmp_path / "out", [0.9])
    for more in ((), ("--launcher", "ray"), ("--launcher", "slurm")):
        ran = lorasmith("sweep", "sweep.toml", "--output", "out", *more)
        assert ran.code == 0, ran.err
        assert "0 of 2 runs to do" in ran.out and str(Path("out/rate-1e-4")) in ran.out


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lorasmith", *map(str, arguments)]


def result(folder: Path) -> dict[str, Any]:
    return {one["name"]: one for one in json.loads((folder / "sweep.json").read_text())["runs"]}


@pytest.mark.slow
@posix
def test_two_runs_and_one_that_fails(lorasmith: Command, tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 4)
    (tmp_path / "empty").mkdir()
    text = (tmp_path / "sweep.toml", sweep_of(tmp_path, "rank = [2]\n"))[0].read_text()
    text = text.replace('sources = "photos"\n', "").replace("rank = [2]", 'folder = ["photos", "empty"]\nseed = [0, 1]')
    (tmp_path / "sweep.toml").write_text(text)
    ran = lorasmith("sweep", "sweep.toml", "--devices", "cpu")
    assert ran.code == 1, ran.err
    found = result(tmp_path / "runs" / "sweep")
    assert {name: one["state"] for name, one in found.items()} == {
        "folder-photos_seed-0": "complete",
        "folder-photos_seed-1": "complete",
        "folder-empty_seed-0": "failed",
        "folder-empty_seed-1": "failed",
    }
    one, other = found["folder-photos_seed-0"], found["folder-photos_seed-1"]
    assert one["base_loss"] == other["base_loss"] and one["judged_by"] == other["judged_by"], (
        "paired by images and noise"
    )
    assert one["loss"] != other["loss"]
    assert "empty" in found["folder-empty_seed-0"]["error"]
    page = (tmp_path / "runs" / "sweep" / "sweep.html").read_text("utf-8")
    assert 'href="folder-photos_seed-0/report.html"' in page and "Failed and unfinished" in page

    def times() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for path in (tmp_path / "runs/sweep").glob("folder-photos*/*.safetensors")
        }

    before = times()
    again = lorasmith("sweep", "sweep.toml")
    assert again.code == 1 and "2 of 4 runs to do" in again.out, "the failed ones are tried again"
    assert before and times() == before


@pytest.mark.slow
@posix
def test_ctrl_c_stops_and_saves_and_the_same_command_continues_to_the_bit(lorasmith: Command, tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 4)
    sweep = sweep_of(tmp_path, "seed = [3]\n")
    text = (tmp_path / "sweep.toml").read_text().replace("steps = 4", "steps = 40")
    (tmp_path / "sweep.toml").write_text(text)
    name, part = names_of(sweep)[0], tmp_path / "part"
    process = subprocess.Popen(command("sweep", "sweep.toml", "--output", "part"), cwd=tmp_path, stdout=subprocess.PIPE)
    events = part / name / "events.jsonl"
    until = time.monotonic() + 300
    while not (events.exists() and '"StepDone"' in events.read_text()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130, out
    stopped = result(part)[name]
    assert stopped["state"] == "stopped" and 0 < stopped["steps"] < 40 and stopped["error"] == ""
    assert f"Stopped   {name}" in out.decode()

    ran = lorasmith("sweep", "sweep.toml", "--output", "part")
    assert ran.code == 0, ran.err
    assert result(part)[name]["state"] == "complete"
    assert "bit-identically" in (part / "logs" / f"{name}.txt").read_text()
    ran = lorasmith("sweep", "sweep.toml", "--output", "whole")
    assert ran.code == 0, ran.err
    assert tensors_of(part / name) == tensors_of(tmp_path / "whole" / name)


SBATCH = """\
for last; do :; done
for task in $(sed -n 's/^#SBATCH --array=//p' "$last" | tr ',' ' '); do
    for number in $(seq ${task%-*} ${task#*-}); do SLURM_ARRAY_TASK_ID=$number bash "$last" > "$last.$number" 2>&1; done
done
echo 17
"""


@pytest.mark.slow
@posix
def test_an_array_of_slurm_runs_the_runs_that_are_left(
    lorasmith: Command, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/bash\n{SBATCH}")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    left_by(sweep, names_of(sweep)[0], tmp_path / "out", [0.9])
    ran = lorasmith("sweep", "sweep.toml", "--output", "out", "--launcher", "slurm", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == {"job": "17", "script": str(tmp_path / "out" / "sweep.sbatch"), "runs": [2]}
    assert "Complete  rate-3e-4" in (tmp_path / "out" / "sweep.sbatch.2").read_text()
    assert {one["state"] for one in result(tmp_path / "out").values()} == {"complete"}
    assert "0 of 2 runs to do" in lorasmith("sweep", "sweep.toml", "--output", "out", "--launcher", "slurm").out
