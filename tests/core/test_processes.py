"""Several processes on torch.distributed; `tests/training/test_run_together.py` has what a run does with them."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorasmith
from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.launched import LaunchedProcess
from lorasmith.core.processes import ALONE, Processes, _check_gpus, _gpu_of, current, joined
from tests.launched import LONG_S, environment, free_port

SCRIPT = """
import sys, torch
from lorasmith.core.errors import OptionError
from lorasmith.core.launched import LaunchedProcess
from lorasmith.core.processes import current, joined

rank, port = int(sys.argv[1]), int(sys.argv[2])
with joined(LaunchedProcess(rank, 2, rank, "127.0.0.1", port)) as together:
    assert current() is together and together.size == 2
    tensor = torch.full((3,), float(rank + 1))
    together.summing(tensor)()
    assert tensor.tolist() == [3.0, 3.0, 3.0]
    assert together.summed([rank, 1]) == [1, 2]
    assert together.gathered({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert together.broadcast_from_rank0(lambda: f"of {rank}") == "of 0"

    def refuse():
        raise OptionError("a sentence")

    try:
        together.broadcast_from_rank0(refuse)
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
    with joined(None) as processes, processes.rank0_first():
        assert processes is current() is ALONE
        assert processes.summed([2, 3]) == [2, 3]
        assert processes.gathered("a") == ["a"]
        assert processes.broadcast_from_rank0(lambda: 7) == 7


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
    port = str(free_port())
    pair = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    first, second = (one.communicate(timeout=LONG_S)[0] for one in pair)
    assert second == "1: a sentence\n"
    lines = first.splitlines()
    assert lines[0] == "0: a sentence"
    assert "all processes of a run must continue together, but another one was killed, or cannot be reached" in lines[1]
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


def imported_at_once(path: Path) -> Iterator[str]:
    """What a module imports when it is imported, but for the types that it names."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_texts_of_torch_are_not_passed_on() -> None:
    for text, reason in [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] GLHF! \U0001f3d6\ufe0f Connection closed by "
            "peer [10.0.0.2]:40181. This may indicate a remote rank failure",
            "the connection was closed",
        ),
        (
            "The client socket has timed out after 60000ms while trying to connect to (a, 1).",
            "it did not answer in time",
        ),
        ("anything else", "RuntimeError"),
    ]:
        assert f"({reason})" in str(Processes().lost(RuntimeError(text)))
        assert Processes().lost(RuntimeError(text)).exit_code == 75  # type: ignore[attr-defined]


def test_no_module_imports_what_one_process_has_no_use_for() -> None:
    modules = list(Path(lorasmith.__file__).parent.rglob("*.py"))
    found = {str(path): [one for one in imported_at_once(path) if "torch.distributed" in one] for path in modules}
    assert "torch.Tensor" in imported_at_once(next(path for path in modules if path.name == "processes.py"))
    assert {name: imported for name, imported in found.items() if imported} == {}


RUN_ALONE = """
import sys
importers = set()

class Noted:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch.distributed"):
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            importers.add(frame.f_globals["__name__"].partition(".")[0])

sys.meta_path.insert(0, Noted())
from lorasmith.cli.main import main
sys.argv = ["lorasmith", "train", *sys.argv[1:]]
try:
    main()
finally:
    print("importers:", *sorted(importers))
"""


@pytest.mark.slow
def test_a_run_in_one_process_imports_nothing_for_several(tmp_path: Path) -> None:
    from tests.runs.folder_cases import pictures

    pictures(tmp_path / "photos", 2)
    arguments = ["photos", "--model", "lorasmith-tiny", "--steps", "1", "--batch-size", "2", "--no-previews"]
    command = [sys.executable, "-c", RUN_ALONE, *arguments, "--validation-share", "0", "--resolution", "32"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    importers = ran.stdout.splitlines()[-1].split()
    assert "torch" in importers and "lorasmith" not in importers, importers
