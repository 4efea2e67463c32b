"""`lorasmith train` on several hosts under torchrun, and what it must come to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.hosts import Host

PORT = 29500

SETTINGS: dict[str, object] = {
    "model": "lorasmith-tiny",
    "steps": 8,
    "batch-size": 2,
    "optimizer": "SGD",  # others divide by the size of a gradient, and so enlarge the rounding of small ones
    "learning-rate": 0.05,
    "dtype": "fp32",
    "seed": 1,
    "save-state-every": 1,
    "validation-share": 0,
    "rank": 4,
}


def training(output: str, folder: str = "photos", **settings: object) -> list[str]:
    """The words of a training."""
    given = SETTINGS | {name.replace("_", "-"): value for name, value in settings.items()}
    options = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return ["train", folder, *options, "--no-previews", "--output", output]


def torchrun(
    first: Host | None, nodes: str | int = 2, *, processes: int = 1, restarts: int = 0, more: Sequence[object] = ()
) -> list[str]:
    """The words of the launcher.

    Args:
        first: the host where the agents meet; None for one host alone.
        nodes: number of hosts, or least and most.
        processes: on each host.
        restarts: after a failure.
        more: options of torchrun.
    """
    endpoint = "localhost:0" if first is None else f"{first.name}:{PORT}"
    options = ("--nnodes", nodes, "--nproc-per-node", processes, "--max-restarts", restarts)
    meeting = ("--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", endpoint, *more)
    return [sys.executable, *map(str, ("-m", "torch.distributed.run", *options, *meeting, "-m", "lorasmith"))]


def started(
    host: Host, command: Sequence[object], folder: Path, log: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """A command on a host, whose output is appended to a file."""
    with log.open("a") as out:
        threads = {"OMP_NUM_THREADS": "1"}
        return host.start(command, cwd=folder, stdout=out, stderr=out, env=threads | dict(env or {}))


def run_on(
    hosts: Sequence[Host], folder: Path, train: Sequence[str], env: Mapping[str, str] | None = None, **launcher: Any
) -> list[str]:
    """Train on all hosts to the end; returns what each of them printed. Raises AssertionError if one fails."""
    command = [*torchrun(hosts[0], len(hosts), **launcher), *train]
    logs = [folder / f"{host.name}.log" for host in hosts]
    for log in logs:
        log.unlink(missing_ok=True)
    agents = [started(host, command, folder, log, env) for host, log in zip(hosts, logs, strict=True)]
    codes = [agent.wait(timeout=600) for agent in agents]
    printed = [log.read_text() for log in logs]
    assert codes == [0] * len(hosts), "\n".join(printed)
    return printed


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in the log of a run, of which the last line may be cut short."""
    log = run / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["event"] == kind]


def assert_alike(one: Path, other: Path) -> None:
    """Two runs have the same steps, draws, losses and tensors, to the rounding of sums."""
    steps, expected = (events_of(run, "StepDone") for run in (one, other))
    assert [step["step"] for step in steps] == [step["step"] for step in expected]
    for step, wanted in zip(steps, expected, strict=True):
        assert sorted(draw[:2] for draw in step["draws"]) == sorted(draw[:2] for draw in wanted["draws"])
        assert abs(step["loss"] - wanted["loss"]) <= 1e-4 * abs(wanted["loss"])
    found = load_file(one / "photos.safetensors")
    for name, tensor in load_file(other / "photos.safetensors").items():
        assert (found[name].float() - tensor.float()).norm() <= 2e-3 * (tensor.float().norm() + 1e-3)
