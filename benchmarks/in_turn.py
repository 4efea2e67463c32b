"""Trainings that run in turn: while one makes a block of steps, the others are stopped.

So all meet the same speed of the machine, which drifts by more than what is measured, and a ratio is the median over
blocks that lie beside each other in time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psutil

from lorasmith.core.folders import BUILT_IN_BASE

PICTURES = "fox"
"""Example pictures that are trained on."""

STEPS = 100_000
"""More than are made: trainings are ended by hand."""

_SETTLING = 2
"""Steps at the start of a block that are not counted."""

_WARM = 10
"""Steps before the first block."""


@dataclass
class Side:
    """One training and all processes beside it, each under the name of its column.

    Attributes:
        log: its `events.jsonl`.
        blocks: medians of its blocks, in milliseconds.
    """

    log: Path
    processes: dict[str, list[psutil.Process]]
    blocks: list[float] = field(default_factory=list)

    def send(self, sign: signal.Signals) -> None:
        """Send a signal to all of them."""
        for process in itertools.chain(*self.processes.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sign)

    def block(self, steps: int) -> None:
        """Let it make some steps while the others are stopped."""
        before = len(self.times())
        self.send(signal.SIGCONT)
        while len(self.times()) < before + steps + 1:
            time.sleep(0.05)
        self.send(signal.SIGSTOP)
        # The step in which it was stopped, and those until memory is warm again, are left out.
        times = self.times()[before + _SETTLING : before + steps + 1]
        self.blocks.append(1000 * statistics.median(b - a for a, b in itertools.pairwise(times)))

    def spent(self) -> dict[str, float]:
        """Processor seconds so far, by column."""
        found = dict.fromkeys(self.processes, 0.0)
        for column, processes in self.processes.items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    found[column] += sum(process.cpu_times()[:2])
        return found

    def times(self) -> list[float]:
        """When each step was done, in seconds; a line that is still being written is left out."""
        if not self.log.exists():
            return []
        lines = self.log.read_bytes().rpartition(b"\n")[0].splitlines()
        return [json.loads(line)["at"] for line in lines if b'"StepDone"' in line]


def in_turn(sides: Sequence[Side], *, pairs: int, steps: int) -> list[dict[str, float]]:
    """Let two trainings make blocks in turn, once both are warm.

    Args:
        sides: the two.
        pairs: blocks of each.
        steps: of a block.

    Returns:
        Processor milliseconds per step of each side, by column.
    """
    for side in sides:
        wait_for_steps(side, _WARM)
    for side in sides:
        side.send(signal.SIGSTOP)
    try:
        before, first = [side.spent() for side in sides], [len(side.times()) for side in sides]
        # A B, B A, A B, ...: what grows with time falls on both alike.
        for pair in range(pairs):
            for side in sides if pair % 2 == 0 else sides[::-1]:
                side.block(steps)
        made = [len(side.times()) - start for side, start in zip(sides, first, strict=True)]
        spent = [side.spent() for side in sides]
    finally:
        for side in sides:
            side.send(signal.SIGCONT)
    return [
        {column: 1000 * (after[column] - was[column]) / count for column in after}
        for was, after, count in zip(before, spent, made, strict=True)
    ]


def ratio(one: Side, other: Side) -> tuple[float, float, float]:
    """Median ratio of the second's blocks to the first's, and where it lies in 95 of 100 repetitions (bootstrap)."""
    ratios = [b / a for a, b in zip(one.blocks, other.blocks, strict=True)]
    random = Random(0)
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[49], medians[1949]


@contextlib.contextmanager
def training(output: Path, environment: Mapping[str, str] | None = None) -> Iterator[Side]:
    """A training of the built-in model from the command line, without previews.

    Args:
        output: folder of the run.
        environment: of the process; this one's if None.
    """
    words = f"--model lorasmith-tiny --steps {STEPS} --no-previews --validation-share 0 --seed 1 --save-every 0"
    command = [sys.executable, "-m", "lorasmith", "train", str(BUILT_IN_BASE / "input" / PICTURES), *words.split()]
    command += ["--output", str(output)]
    # Not in a checkout, whose folder lorasmith-tiny earlier versions take for a model.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, cwd=output.parent) as process:
        yield Side(output / "events.jsonl", {"trains": [psutil.Process(process.pid)]})
        process.send_signal(signal.SIGINT)


def wait_for_steps(side: Side, steps: int) -> None:
    """Wait until a training has made some steps."""
    while len(side.times()) < steps:
        if any(process.status() == psutil.STATUS_ZOMBIE for process in side.processes["trains"]):
            raise RuntimeError(f"the training of {side.log.parent} has ended")
        time.sleep(0.2)
