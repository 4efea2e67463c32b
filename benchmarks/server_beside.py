"""What the server and open pages cost a training: the same steps from the command line and from the server, in turn.

The built-in model is trained on the example pictures, without previews. The server has pages open that show the
training. `step` is the median time between two steps in `events.jsonl`; the other columns are processor seconds per
step: of the process that trains, of server and assistant, and of all of Chromium, which mostly draws. On a machine
without a graphics card Chromium draws with the cores that train; pages on another computer cost the first two alone.

    python -m benchmarks.server_beside
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.results import Results, add_json
from lorasmith.core.folders import ASSETS
from tools.browsing import Served, opened_browser, served

_PICTURES = "fox"
_SETTINGS: dict[str, Any] = {"previews": "", "validation_share": 0.0, "seed": 1}
_FIRST = 10
"""Steps that are not counted: pages open while they run."""


def main() -> None:
    arguments = _arguments()
    results = Results(arguments)
    columns = {"": "", "step, ms": ".1f", "trains, ms": ".1f", "server, ms": ".2f", "Chromium, ms": ".1f"}
    results.table({**columns, "load": ".1f"})
    found: dict[str, list[float]] = {}

    def add(name: str, row: list[float]) -> None:
        found.setdefault(name, []).append(row[0])
        results.add(name, *row, psutil.getloadavg()[0])

    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "base") as server:
        _post(server, {**_SETTINGS, "steps": 2})  # imports, the model, encodings
        names = {number: f"server, {number} pages" for number in arguments.pages}
        for round in range(arguments.rounds):
            add("command line", _from_command_line(Path(folder) / f"run-{round}", arguments.steps))
            for number, name in names.items():
                add(name, _from_server(server, Path(folder) / "base", number, arguments.steps))
    results.table({"ratio of the medians to the command line": "", "": ".3f"})
    for name in names.values():
        results.add(name, statistics.median(found[name]) / statistics.median(found["command line"]))


def _from_command_line(output: Path, steps: int) -> list[float]:
    command = [
        sys.executable,
        "-m",
        "lorasmith",
        "train",
        str(ASSETS / "input" / _PICTURES),
        "--model",
        "lorasmith-tiny",
    ]
    command += [
        "--steps",
        str(steps),
        "--no-previews",
        "--validation-share",
        "0",
        "--seed",
        "1",
        "--output",
        str(output),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        spent = _spent(output / "events.jsonl", steps, [lambda: psutil.Process(process.pid)])
        process.wait()
    return [_step_ms(output / "events.jsonl"), *spent, 0.0, 0.0]


def _from_server(server: Served, base: Path, pages: int, steps: int) -> list[float]:
    parts = [
        lambda: _child(server.pid, "server.worker"),
        lambda: psutil.Process(server.pid),
        lambda: _child(server.pid, "questions.answering"),
    ]
    with _pages(pages) as pages_opened:
        job = _post(server, {**_SETTINGS, "steps": steps}, wait=False)
        pages_opened(f"{server.address}#/jobs/{job['id']}")
        while not job["run"]:
            time.sleep(0.2)
            job = _get(server, f"jobs/{job['id']}")
        log = base / job["run"] / "events.jsonl"
        chromium = [psutil.Process] if pages else []
        trains, serves, assists, *draws = _spent(log, steps, [*parts, *chromium])
        _ended(server, job)
    return [_step_ms(log), trains, serves + assists, *(draws or [0.0])]


@contextlib.contextmanager
def _pages(number: int) -> Iterator[Callable[[str], None]]:
    if not number:
        yield lambda address: None
        return
    with opened_browser() as browser:

        def opened(address: str) -> None:
            for _ in range(number):
                browser.new_page(viewport={"width": 1200, "height": 844}).goto(address)

        yield opened


def _spent(log: Path, steps: int, parts: list[Callable[[], psutil.Process]]) -> list[float]:
    """Processor milliseconds per step of processes; that of this one is all below it but the server: Chromium."""

    def seconds() -> list[float]:
        return [_own(one()) for one in parts]

    while (first := _steps(log)) < _FIRST:
        time.sleep(0.1)
    before = seconds()
    while (last := _steps(log)) < steps - 2:
        time.sleep(0.1)
    return [1000 * (now - then) / (last - first) for now, then in zip(seconds(), before, strict=True)]


def _own(process: psutil.Process) -> float:
    members = [process]
    if process == psutil.Process():
        members = [one for one in process.children(recursive=True) if "chrom" in one.name()]
    total = 0.0
    for one in members:
        with contextlib.suppress(psutil.Error):
            total += sum(one.cpu_times()[:2])
    return total


def _child(pid: int, module: str) -> psutil.Process:
    return next(one for one in psutil.Process(pid).children() if any(module in word for word in one.cmdline()))


def _steps(log: Path) -> int:
    return log.read_bytes().count(b'"StepDone"') if log.exists() else 0


def _step_ms(log: Path) -> float:
    events = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    times = [event["at"] for event in events if event["event"] == "StepDone"][_FIRST:]
    return 1000 * statistics.median(b - a for a, b in itertools.pairwise(times))


def _post(server: Served, settings: dict[str, Any], *, wait: bool = True) -> dict[str, Any]:
    body = {"kind": "train", "dataset": _PICTURES, "model": "lorasmith-tiny", "settings": settings}
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}lorasmith/v1/jobs", json.dumps(body).encode(), head)
    with urllib.request.urlopen(request) as answer:
        job: dict[str, Any] = json.load(answer)
    return _ended(server, job) if wait else job


def _get(server: Served, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.address}lorasmith/v1/{path}") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _ended(server: Served, job: dict[str, Any]) -> dict[str, Any]:
    while job["state"] in ("pending", "running"):
        time.sleep(0.5)
        job = _get(server, f"jobs/{job['id']}")
    assert job["state"] == "completed", job
    return job


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of each training")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--pages", type=int, nargs="+", default=[0, 2], help="numbers of pages that are open")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
