"""Two and four real processes, over gloo, train each case as one process does.

All processes of a world are started once and train all cases, one after the other.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.families.model import Model
from tests.launched import environment, free_port
from tests.training.together_cases import CASES, Materials, assert_alike

pytestmark = pytest.mark.slow

TWICE = ("accumulated", "dropout", "AdamW", "DoRA", "held out", "wildcards", "Flux.1")
"""Cases that are trained again by as many processes."""

Results = list[dict[str, Any]]
World = Callable[[str], Results]
"""What each process has of a case."""


def started(size: int, materials: Materials, out: Path, names: Sequence[str] = ()) -> World:
    port = free_port()
    out.mkdir()
    logs = [out / f"{rank}.txt" for rank in range(size)]
    processes = []
    for rank, log in enumerate(logs):
        given = map(str, (rank, size, port, materials.folder, out, *names))
        with log.open("w") as told:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.training.real_processes", *given],
                    env=environment(LORASMITH_CACHE_DIR=str(out / "cache")),
                    stdout=told,
                    stderr=told,
                )
            )
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join(log.read_text() for log in logs)

    def results(name: str) -> Results:
        found = [torch.load(out / name / f"{rank}.pt", weights_only=False) for rank in range(size)]
        for rank, one in enumerate(found):
            assert "error" not in one, f"process {rank}: {one['error']}"
        return found

    return results


@pytest.fixture(scope="module")
def materials(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return Materials.made(tmp_path_factory.mktemp("materials"), tiny)


@pytest.fixture(scope="module")
def worlds(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> dict[int, World]:
    """By the number of processes."""
    folder = tmp_path_factory.mktemp("worlds")
    return {size: started(size, materials, folder / str(size)) for size in (1, 2, 4)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_a_run_is_that_of_one_process(worlds: dict[int, World], size: int, name: str) -> None:
    (alone,) = worlds[1](name)
    first, *others = worlds[size](name)
    for other in others:
        assert other["losses"] == first["losses"] and other["validations"] == first["validations"]
        assert all(torch.equal(other["tensors"][key], tensor) for key, tensor in first["tensors"].items())
        assert other["path"] is None
    tolerance = CASES[name].tolerance
    assert_alike(first["losses"], first["tensors"], alone["losses"], alone["tensors"], tolerance)
    assert first["draws"] == alone["draws"] and first["reason"] == alone["reason"]
    judged = [[(step, best) for step, _, best in one["validations"]] for one in (first, alone)]
    assert judged[0] == judged[1]
    losses = [[loss for _, loss, _ in one["validations"]] for one in (first, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert first["files"] == alone["files"] and not any(other["files"] for other in others)


@pytest.mark.parametrize("name", ["buckets", "weights", "wildcards", "Flux.1", "Z-Image", "Wan"])
def test_captions_are_encoded_once_over_all_processes(worlds: dict[int, World], name: str) -> None:
    (alone,) = worlds[1](name)
    for size in (2, 4):
        assert sum(one["encoded"] for one in worlds[size](name)) == alone["encoded"]


def test_cases_reach_what_they_are_about(worlds: dict[int, World]) -> None:
    (stopped,), (previews,), (kept,) = (worlds[1](name) for name in ("stopped early", "previews", "kept on the way"))
    assert stopped["reason"] == "stopped" and len(stopped["losses"]) < 6
    assert "cat-best.safetensors" in stopped["files"] or not stopped["validations"][-1][2]
    assert sum(one.startswith("samples/") for one in previews["files"]) > 4
    assert "cat-step00000002.safetensors" in kept["files"]
    assert worlds[1]("wildcards")[0]["encoded"] > 6, "more captions than pictures"


def test_a_number_of_processes_gives_the_same_bits_again(
    worlds: dict[int, World], materials: Materials, tmp_path: Path
) -> None:
    again = started(2, materials, tmp_path / "again", TWICE)
    for name in TWICE:
        (first, _), (second, _) = worlds[2](name), again(name)
        assert first["losses"] == second["losses"] and first["validations"] == second["validations"]
        assert all(torch.equal(second["tensors"][key], tensor) for key, tensor in first["tensors"].items())
