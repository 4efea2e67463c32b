"""What the server and open pages cost a training: the same steps from the command line and from the server, in turn.

The built-in model is trained on the example pictures, without previews, by two processes: `lorasmith train` and the
worker of a server, which has pages open that show it. One of the two sides is stopped (SIGSTOP) while the other makes a
block of steps: server, assistant and Chromium stop with their worker. So both sides meet the same speed of the machine,
which drifts by more than what is measured, and `ratio` is the median over pairs of blocks that lie beside each other in
time; in 95 of 100 repetitions it is between `from` and `to`.

`step` is the median time between two steps in `events.jsonl`. The other columns are processor milliseconds per step: of
the process that trains, of server and assistant, and of all of Chromium, which mostly draws. On a machine without a
graphics card Chromium draws with the cores that train; pages on another computer cost the first two alone.

    python -m benchmarks.server_beside
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from benchmarks.results import Results, add_json
from lorasmith.core.folders import ASSETS
from tools.browsing import Served, opened_browser, served

_PICTURES = "fox"
_STEPS = 100_000  # more than are made: both trainings are ended by hand
_SETTINGS: dict[str, Any] = {"previews": "", "validation_share": 0.0, "seed": 1, "save_every": 0}
_SETTLING = 2
"""Steps at the start of a block that are not counted."""


@dataclass
class _Side:
    """One training and all processes beside it, each under the name of its column.

    Attributes:
        log: its `events.jsonl`.
        blocks: medians of its blocks, in milliseconds.
    """

    log: Path
    processes: dict[str, list[psutil.Process]]
    blocks: list[float] = field(default_factory=list)

    def send(self, sign: signal.Signals) -> None:
        for process in itertools.chain(*self.processes.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sign)

    def block(self, steps: int) -> None:
        """Let it make some steps while the other side is stopped."""
        before = len(_times(self.log))
        self.send(signal.SIGCONT)
        while len(_times(self.log)) < before + steps + 1:
            time.sleep(0.05)
        self.send(signal.SIGSTOP)
        # The step in which it was stopped, and those until memory is warm again, are left out.
        times = _times(self.log)[before + _SETTLING : before + steps + 1]
        self.blocks.append(1000 * statistics.median(b - a for a, b in itertools.pairwise(times)))

    def spent(self) -> dict[str, float]:
        """Processor seconds so far, by column."""
        found = dict.fromkeys(self.processes, 0.0)
        for column, processes in self.processes.items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    found[column] += sum(process.cpu_times()[:2])
        return found


def main() -> None:
    arguments = _arguments()
    results = Results(arguments, threads=os.environ.get("OMP_NUM_THREADS", "as many as cores"))
    columns = {"": "", "step, ms": ".1f", "trains, ms": ".1f", "server, ms": ".2f", "Chromium, ms": ".1f"}
    results.table({**columns, "ratio": ".4f", "from": ".4f", "to": ".4f"})
    for pages in arguments.pages:
        with tempfile.TemporaryDirectory() as folder:
            _measured(Path(folder), pages, arguments, results)


def _measured(folder: Path, pages: int, arguments: argparse.Namespace, results: Results) -> None:
    with served(folder / "base") as server, _command_line(folder / "run") as alone, _with_pages(server, pages) as with_:
        beside = _from_server(server, folder / "base", with_)
        sides = (alone, beside)
        for side in sides:
            _wait_for(side.log, 10)
        for side in sides:
            side.send(signal.SIGSTOP)
        try:
            before, first = [side.spent() for side in sides], [len(_times(side.log)) for side in sides]
            # A B, B A, A B, ...: what grows with time falls on both alike.
            for pair in range(arguments.pairs):
                for side in sides if pair % 2 == 0 else sides[::-1]:
                    side.block(arguments.steps)
            made = [len(_times(side.log)) - start for side, start in zip(sides, first, strict=True)]
            spent = [side.spent() for side in sides]
        finally:
            for side in sides:
                side.send(signal.SIGCONT)
    ratios = [b / a for a, b in zip(alone.blocks, beside.blocks, strict=True)]
    for name, index, side in (("command line", 0, alone), (f"server, {pages} pages", 1, beside)):
        used = [1000 * (spent[index][column] - before[index][column]) / made[index] for column in side.processes]
        row = [statistics.median(side.blocks), *used, *[0.0] * (3 - len(used))]
        results.add(name, *row, *((statistics.median(ratios), *_interval(ratios)) if index else (None,) * 3))


def _interval(values: list[float]) -> tuple[float, float]:
    """Where the median of as many values lies in 95 of 100 samples of these (bootstrap)."""
    random = Random(0)
    medians = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(2000))
    return medians[49], medians[1949]


@contextlib.contextmanager
def _command_line(output: Path) -> Iterator[_Side]:
    words = f"--model lorasmith-tiny --steps {_STEPS} --no-previews --validation-share 0 --seed 1 --save-every 0"
    command = [sys.executable, "-m", "lorasmith", "train", str(ASSETS / "input" / _PICTURES), *words.split()]
    with subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.DEVNULL) as process:
        yield _Side(output / "events.jsonl", {"trains": [psutil.Process(process.pid)]})
        process.send_signal(signal.SIGINT)


@contextlib.contextmanager
def _with_pages(server: Served, number: int) -> Iterator[Any]:
    if not number:
        yield lambda address: []
        return
    with opened_browser() as browser:

        def opened(address: str) -> list[psutil.Process]:
            for _ in range(number):
                browser.new_page(viewport={"width": 1200, "height": 844}).goto(address)
            return [one for one in psutil.Process().children(recursive=True) if "chrom" in one.name()]

        yield opened


def _from_server(server: Served, base: Path, pages_opened: Any) -> _Side:
    job = _post(server, {**_SETTINGS, "steps": _STEPS})
    while not job["run"]:
        time.sleep(0.2)
        job = _get(server, f"jobs/{job['id']}")
    pages = pages_opened(f"{server.address}#/jobs/{job['id']}")
    processes = {
        "trains": [_child(server.pid, "server.worker")],
        "serves": [psutil.Process(server.pid), _child(server.pid, "questions.answering")],
        "draws": pages,
    }
    return _Side(base / job["run"] / "events.jsonl", processes)


def _child(pid: int, module: str) -> psutil.Process:
    return next(one for one in psutil.Process(pid).children() if any(module in word for word in one.cmdline()))


def _wait_for(log: Path, steps: int) -> None:
    while not log.exists() or len(_times(log)) < steps:
        time.sleep(0.2)


def _times(log: Path) -> list[float]:
    """When each step was done, in seconds; a line that is still being written is left out."""
    lines = log.read_bytes().rpartition(b"\n")[0].splitlines()
    return [json.loads(line)["at"] for line in lines if b'"StepDone"' in line]


def _post(server: Served, settings: dict[str, Any]) -> dict[str, Any]:
    body = {"kind": "train", "dataset": _PICTURES, "model": "lorasmith-tiny", "settings": settings}
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}lorasmith/v1/jobs", json.dumps(body).encode(), head)
    with urllib.request.urlopen(request) as answer:
        job: dict[str, Any] = json.load(answer)
    return job


def _get(server: Served, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.address}lorasmith/v1/{path}") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="of a block")
    parser.add_argument("--pairs", type=int, default=40, help="blocks of each side")
    parser.add_argument("--pages", type=int, nargs="+", default=[0, 2], help="numbers of pages that are open")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
