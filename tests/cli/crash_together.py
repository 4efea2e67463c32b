"""Processes and hosts of one run that are killed at random moments must change nothing that the run comes to.

    python -m tests.cli.crash_together --kills 20

Two hosts (`benchmarks.hosts`) train one run under elastic agents, `--nnodes 1:2`. After a random time something is
killed (SIGKILL): a process, an agent alone, whose process is left behind, or a whole host, which in some trials comes
back. The agents start those that are left again, from the last run state. Where the host at which agents meet is
killed, or its agent, no agent can; nor can they always where a host comes back before its death was noticed. Then all
must have ended, and the run is started again by hand, in one process. In the end there must be the steps, samples,
losses and tensors of a run that nobody disturbed, in one process, to the rounding of sums.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.hosts import Host, hosts
from lorasmith.training.storage.run_folder import RunFolder
from tests.cli.host_runs import assert_alike, events_of, started, torchrun, training

KINDS = ("process", "host", "host that comes back", "agent", "meeting host", "meeting agent")
"""What is killed."""

_BY_HAND = ("host that comes back", "meeting host", "meeting agent")
"""Kinds after which torch's agents may give up."""

_STEPS = 20
_TIMEOUTS = ("--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3")
_LONGEST_S = 900.0
"""Of a trial. A process waits 300 s for another at the start, and an agent for another at the end."""


class Trials:
    """Kills runs and compares what they come to.

    Args:
        work: folder for the runs.
        pair: the hosts; agents meet at the first.
    """

    def __init__(self, work: Path, pair: list[Host]) -> None:
        self._work = work
        self._hosts = pair
        self._train = training("trial", steps=_STEPS)
        self._pictures()
        self._run_alone(training("alone", steps=_STEPS))
        began = time.monotonic()
        agents = [self._start(host) for host in pair]
        assert [agent.wait(_LONGEST_S) for agent in agents] == [0, 0], self.printed
        self._seconds = time.monotonic() - began
        assert_alike(work / "trial", work / "alone")

    @property
    def _steps(self) -> int:
        return len(events_of(self._work / "trial", "StepDone"))

    @property
    def printed(self) -> str:
        """What all agents and processes of the trial have printed."""
        return "\n".join(log.read_text() for log in sorted(self._work.glob("*.log")))

    def trial(self, kind: str, chance: random.Random) -> tuple[bool, str]:
        """One run with one kill; returns whether the agents ended it, and what happened.

        Raises:
            AssertionError: it is not the run that nobody disturbed.
        """
        shutil.rmtree(self._work / "trial", ignore_errors=True)
        for log in self._work.glob("*.log"):
            log.unlink()
        moment, step = chance.uniform(0, self._seconds), _STEPS + 1
        if chance.random() < 0.5:  # between the first step and the last, which take less time than starting
            moment, step = self._seconds, chance.randrange(1, _STEPS)
        first, second = self._hosts
        agents = [self._start(host) for host in self._hosts]
        began = time.monotonic()
        _wait(agents, moment, lambda: self._steps >= step)
        at_step = self._steps
        victim = first if kind.startswith("meeting") or (kind == "process" and chance.random() < 0.5) else second
        hit, killed_s = self._kill(kind, victim), time.monotonic() - began
        if kind == "host that comes back":
            time.sleep(chance.uniform(0, 10))
            agents[1] = self._start(second)
        _wait(agents, _LONGEST_S)
        took = time.monotonic() - began
        codes = [agent.poll() for agent in agents]
        assert None not in codes, f"{kind} killed after {killed_s:.1f} s: nothing ends\n{self.printed}"
        by_hand = not RunFolder(self._work / "trial").is_done
        if by_hand:
            assert kind in _BY_HAND, f"{kind} killed after {killed_s:.1f} s: {codes}\n{self.printed}"
            for host in self._hosts:
                host.kill()
            self._run_alone(self._train)
        assert_alike(self._work / "trial", self._work / "alone")
        ended = f"by hand, after the agents' {took:.0f} s" if by_hand else f"by the agents, in {took:.0f} s"
        return (
            not by_hand,
            f"{kind} {'killed' if hit else 'gone before'} at {moment:.1f} s, step {at_step}: ended {ended}",
        )

    def _kill(self, kind: str, victim: Host) -> bool:
        """Kill what the kind says; whether it was there."""
        if "host" in kind:
            was_there = bool(victim.processes)
            victim.kill()
            return was_there
        found = [one for one in map(psutil.Process, victim.processes) if "torch.distributed.run" in one.cmdline()]
        targets = found if "agent" in kind else [child for agent in found for child in agent.children()]
        for target in targets[:1]:
            os.kill(target.pid, signal.SIGKILL)
        return bool(targets)

    def _start(self, host: Host) -> subprocess.Popen[str]:
        command = [*torchrun(self._hosts[0], "1:2", restarts=3, more=_TIMEOUTS), *self._train]
        return started(host, command, self._work, self._work / f"{host.name}.log")

    def _run_alone(self, train: list[str]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "lorasmith", *train],
            cwd=self._work,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def _pictures(self) -> None:
        folder = self._work / "photos"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for index in range(6):
            pixels = rng.integers(0, 255, (80, 64 + 32 * (index == 3), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")


def _wait(agents: list[subprocess.Popen[str]], seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    """Until all have ended or a condition holds, at most for some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(agent.poll() is None for agent in agents) and not until():
        time.sleep(0.02)


@contextmanager
def trials() -> Iterator[Trials]:
    """Trials in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lorasmith-crash-together-") as folder, hosts(2) as pair:
        yield Trials(Path(folder), pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    start = time.monotonic()
    counts: collections.Counter[tuple[str, bool]] = collections.Counter()
    with trials() as trial:
        for number in range(1, arguments.kills + 1):
            kind = arguments.kinds[(number - 1) % len(arguments.kinds)]
            by_agents, told = trial.trial(kind, chance)
            counts[kind, by_agents] += 1
            print(f"{number}: {told}", flush=True)
    whole = {
        by_agents: ", ".join(f"{count} × {kind}" for (kind, by), count in counts.items() if by is by_agents)
        for by_agents in (True, False)
    }
    print(
        f"{arguments.kills} kills in {time.monotonic() - start:.0f} s, ended by the agents ({whole[True]}) or by hand "
        f"({whole[False]}): each run ended with the steps, samples, losses and tensors of one that nobody disturbed."
    )


if __name__ == "__main__":
    main()
