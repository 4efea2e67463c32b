"""One run on several hosts, which are network namespaces: its result, its bytes, and what goes wrong between hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.hosts import Host, hosts, missing
from tests.cli.host_runs import assert_alike, events_of, run_on, started, torchrun, training
from tests.launched import LONG_S

pytestmark = pytest.mark.slow


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    if reason := missing():
        pytest.skip(reason)
    with hosts(2) as found:
        yield found


@pytest.fixture
def alone(photos: Path, tmp_path: Path) -> Path:
    command = [sys.executable, "-m", "lorasmith", *training("alone")]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return tmp_path / "alone"


def test_two_hosts_train_the_run_of_one(pair: list[Host], alone: Path, tmp_path: Path) -> None:
    printed = run_on(pair, tmp_path, training("together"))
    assert sorted("Run folder" in one for one in printed) == [False, True]
    assert sorted(map(bool, printed)) == [False, True]  # not a line more than the run's own
    assert_alike(tmp_path / "together", alone)


@pytest.mark.parametrize("count", [2, 4])
def test_bytes_of_a_step_are_those_of_the_model(photos: Path, tmp_path: Path, count: int) -> None:
    if reason := missing():
        pytest.skip(reason)
    sent, (few, many) = {}, (4, 16)
    with hosts(count) as found:
        for steps in (few, many):
            before = [host.sent_bytes for host in found]
            train = training(f"steps{steps}", steps=steps, rank=32, batch_size=4, save_state_every=100)
            run_on(found, tmp_path, train)
            sent[steps] = [host.sent_bytes - was for host, was in zip(found, before, strict=True)]
    (started,) = events_of(tmp_path / f"steps{few}", "RunStarted")
    parameters = int(started["parameters"])
    model = 4 * parameters * 2 * (count - 1) / count
    for before, after in zip(sent[few], sent[many], strict=True):
        each = (after - before) / (many - few)
        print(f"{count} hosts: {each:,.0f} bytes a step, {each / model:.4f} of the model")
        assert model < each < 1.02 * model


@pytest.fixture
def start(pair: list[Host], photos: Path, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a training on each host; what is still there afterwards is killed by `pair`."""

    def begin(*trains: list[str], envs: tuple[dict[str, str], ...] = ({}, {}), **launcher: Any) -> Started:
        return Started(tmp_path, pair, trains, envs, launcher)

    yield begin


class Started:
    """A run that was started on two hosts.

    Args:
        folder: of the run's command.
        pair: the hosts.
        trains: words of the training on each of them.
        envs: further variables on each of them.
        launcher: settings of `torchrun`.
    """

    def __init__(
        self,
        folder: Path,
        pair: list[Host],
        trains: tuple[list[str], ...],
        envs: tuple[dict[str, str], ...],
        launcher: dict[str, Any],
    ) -> None:
        self.pair = pair
        self._logs = [folder / f"{host.name}.log" for host in pair]
        command = torchrun(pair[0], 2, **launcher)
        self.agents = [
            started(host, [*command, *train], folder, log, env)
            for host, train, log, env in zip(pair, trains, self._logs, envs, strict=True)
        ]

    def codes(self, seconds: float = LONG_S) -> list[int]:
        """Exit codes of the agents."""
        return [agent.wait(timeout=seconds) for agent in self.agents]

    @property
    def printed(self) -> str:
        """What both hosts have printed."""
        return "\n".join(log.read_text() for log in self._logs)

    def worker(self, number: int) -> psutil.Process:
        """The process that trains on a host."""
        agents = [psutil.Process(one) for one in self.pair[number].processes]
        (found,) = [child for one in agents if "torch.distributed.run" in one.cmdline() for child in one.children()]
        return found

    def wait_for_steps(self, run: Path, count: int) -> None:
        """Until that many steps are taken."""
        until = time.monotonic() + LONG_S
        while len(events_of(run, "StepDone")) < count:
            assert time.monotonic() < until and all(agent.poll() is None for agent in self.agents), self.printed
            time.sleep(0.05)


def sentences(printed: str) -> list[str]:
    """The lines of errors. Raises AssertionError if a process of ours printed a stack trace."""
    ours = [line for line in printed.splitlines() if "lorasmith/" in line and 'File "' in line]
    assert not ours, printed
    found = (line.partition("] ")[2] if line.startswith("[rank ") else line for line in printed.splitlines())
    return [line for line in found if line.startswith(("error:", "stopped:"))]


Begin = Callable[..., Started]


def test_a_process_that_stands_still_is_waited_for(start: Begin, alone: Path, tmp_path: Path) -> None:
    run = start(*[training("together")] * 2)
    run.wait_for_steps(tmp_path / "together", 2)
    worker = run.worker(1)
    worker.suspend()
    time.sleep(8)
    worker.resume()
    assert run.codes() == [0, 0]
    assert_alike(tmp_path / "together", alone)


@pytest.mark.parametrize("differs", ["versions", "settings", "images"])
def test_hosts_that_differ_are_refused_by_name(start: Begin, tmp_path: Path, differs: str) -> None:
    trains, envs = [training("together"), training("together")], [{}, {}]
    if differs == "versions":
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "sitecustomize.py").write_text(
            "import importlib.metadata as metadata\nfound = metadata.version\n"
            "metadata.version = lambda name: '0.0.1' if name == 'diffusers' else found(name)\n"
        )
        envs[1] = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "other"), os.environ.get("PYTHONPATH", "")])}
    elif differs == "settings":
        trains[1] = training("together", learning_rate=0.04)
    else:
        shutil.copytree(tmp_path / "photos", tmp_path / "other" / "photos")
        (tmp_path / "other" / "photos" / "0.txt").write_text("a dog")
        trains[1] = training("together", str(tmp_path / "other" / "photos"))
    run = start(*trains, envs=tuple(envs), restarts=2)
    assert run.codes() == [1, 1]
    print(run.printed)
    (said,) = sentences(run.printed)
    named = {"versions": "diffusers", "settings": "learning_rate", "images": "images or captions"}[differs]
    assert "all processes of a run must have the same" in said and named in said
    assert not events_of(tmp_path / "together", "StepDone")


def test_a_full_disk_is_said_once_and_the_run_goes_on_later(start: Begin, alone: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)]
    if subprocess.run(mounted, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        run = start(*[training("disk/run")] * 2)
        run.wait_for_steps(disk / "run", 2)
        with (disk / "others").open("wb", buffering=0) as others:
            while any(agent.poll() is None for agent in run.agents):  # the run removes an old state to have space
                with contextlib.suppress(OSError):
                    while True:
                        others.write(bytes(4096))
                time.sleep(0.01)
        codes = run.codes()
        print(run.printed)
        assert codes == [1, 1]
        assert len(sentences(run.printed)) == 1
        (disk / "others").unlink()
        again = start(*[training("disk/run")] * 2)
        assert again.codes() == [0, 0], again.printed
        assert "continues from step" in again.printed
        assert_alike(disk / "run", alone)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("at_once", [False, True])
def test_ctrl_c_saves_once_and_a_second_one_ends_at_once(
    start: Begin, alone: Path, tmp_path: Path, at_once: bool
) -> None:
    run = start(*[training("together", steps=8)] * 2)
    run.wait_for_steps(tmp_path / "together", 2)
    for agent in run.agents:
        os.killpg(agent.pid, signal.SIGINT)  # as a terminal does
    if at_once:
        time.sleep(0.2)
        for agent in run.agents:
            os.killpg(agent.pid, signal.SIGINT)
    codes = run.codes()
    print(codes, run.printed)
    again = start(*[training("together")] * 2)
    assert again.codes() == [0, 0], again.printed
    assert_alike(tmp_path / "together", alone)


def test_a_port_that_is_taken_is_a_sentence(pair: list[Host], photos: Path, tmp_path: Path) -> None:
    listening = "import socket; s = socket.socket(); s.bind(('0.0.0.0', 29500)); s.listen(); print(flush=True)"
    with pair[0].start(
        [sys.executable, "-i", "-c", listening], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as listener:
        assert listener.stdout is not None and listener.stdout.readline() == "\n"
        try:
            _refused(pair, tmp_path)
        finally:
            pair[0].kill()


def _refused(pair: list[Host], tmp_path: Path) -> None:
    """Both processes end, each with a sentence."""
    logs = [tmp_path / f"{host.name}.log" for host in pair]
    processes = []
    for rank, (host, log) in enumerate(zip(pair, logs, strict=True)):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "host1", "MASTER_PORT": "29500"}
        processes.append(started(host, [sys.executable, "-m", "lorasmith", *training("run")], tmp_path, log, env))
    codes = [process.wait(timeout=LONG_S) for process in processes]
    printed = [log.read_text() for log in logs]
    print(*printed)
    assert codes == [1, 1]
    for rank, one in enumerate(printed):
        (said,) = sentences(one)
        assert f"must reach each other at host1:29500, but process {rank} cannot" in said
