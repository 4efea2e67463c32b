"""Several processes on torch.distributed; `tests/training/test_run_together.py` has what a run does with them."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.launch_environment import LaunchedProcess
from lorasmith.core.processes import ALONE, _check_gpus, _gpu_of, current, joined

SCRIPT = """
import sys, torch
from lorasmith.core.errors import OptionError
from lorasmith.core.launch_environment import LaunchedProcess
from lorasmith.core.processes import current, joined

rank, port = int(sys.argv[1]), int(sys.argv[2])
with joined(LaunchedProcess(rank, 2, rank, "127.0.0.1", port)) as together:
    assert current() is together and together.size == 2
    tensor = torch.full((3,), float(rank + 1))
    together.summing(tensor)()
    assert tensor.tolist() == [3.0, 3.0, 3.0]
    assert together.summed([rank, 1]) == [1, 2]
    assert together.gathered({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert together.from_first(lambda: f"of {rank}") == "of 0"

    def refuse():
        raise OptionError("a sentence")

    try:
        together.from_first(refuse)
    except OptionError as error:
        print(f"{rank}: {error}")
    if rank == 1:
        sys.exit("gone")
    try:
        together.gathered(0)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_alone_nothing_is_waited_for() -> None:
    with joined(None) as processes, processes.first_alone():
        assert processes is current() is ALONE
        assert processes.summed([2, 3]) == [2, 3]
        assert processes.gathered("a") == ["a"]
        assert processes.from_first(lambda: 7) == 7


def test_processes_take_the_gpus_that_they_see() -> None:
    assert [_gpu_of(local, 4) for local in range(4)] == [0, 1, 2, 3]
    assert _gpu_of(3, 1) == 0  # as under `srun --gpus-per-task 1`
    assert _gpu_of(3, 0) is None


def test_a_gpu_for_two_processes_is_refused() -> None:
    _check_gpus([None, None])
    _check_gpus(["a", "b"])
    with pytest.raises(OptionError, match="process 2 has that of process 0; start as many on a machine"):
        _check_gpus(["a", "b", "a"])


@pytest.mark.slow
def test_two_processes_agree() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pair = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    first, second = (one.communicate(timeout=120)[0] for one in pair)
    assert second == "1: a sentence\n"
    lines = first.splitlines()
    assert lines[0] == "0: a sentence"
    assert "all processes of a run must go on together, but another one was killed, or cannot be reached" in lines[1]
    assert ".cc:" not in lines[1]
    assert lines[1].endswith("the same command continues the run")


@pytest.mark.slow
def test_an_address_that_is_taken_is_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched = LaunchedProcess(0, 2, 0, "127.0.0.1", port)
        said = rf"must reach each other at 127.0.0.1:{port}, but process 0 cannot"
        with pytest.raises(TrainingError, match=said), joined(launched):
            raise AssertionError
    assert current() is ALONE
