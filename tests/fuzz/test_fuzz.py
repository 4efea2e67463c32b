"""No damaged file surprises us, in as many cases as fit into five seconds; `make fuzz` goes through more."""

from __future__ import annotations

import importlib
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lorasmith.core.errors import LoraError
from tests.fuzz import engine
from tests.fuzz.corpus import remembered
from tests.fuzz.engine import Door, FaultError, Finding, Kind, run_case
from tests.fuzz.kinds import KINDS, cases, prepare

COUNT = 400
PARTS = 4


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    prepare()


@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_files_are_read_or_refused(part: int) -> None:
    known = remembered()
    todo = [*known, *cases(COUNT - len(known))][part::PARTS]
    assert [str(one) for kind, seed in todo for one in run_case(KINDS[kind], seed)] == []


def test_a_case_is_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS.values():
        written = []
        for name in ("first", "second"):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
            inside = folder / kind.name
            inside.mkdir()
            kind.doors(random.Random("x"), inside)
            files = sorted(one for one in inside.rglob("*") if one.is_file() and not one.is_symlink())
            written.append([one.read_bytes().replace(os.fsencode(inside), b"") for one in files])
        assert written[0] == written[1]


def judged(door: Callable[[Path], str | None], write: bytes = b"") -> list[Finding]:
    """The findings of a kind whose only door is `door`."""

    def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
        (folder / "x").write_bytes(write)
        return [("door", lambda: door(folder))]

    return run_case(Kind("made", 1, doors), 0)


def refuse(error: BaseException) -> Callable[[Path], str | None]:
    def door(folder: Path) -> str | None:
        raise error

    return door


def slow(folder: Path) -> None:
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass


def grow(folder: Path) -> None:
    with mmap.mmap(-1, 2**25) as pages:  # which no allocator has kept
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1


def hang(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "pipe").read_bytes()


@pytest.mark.parametrize(
    ("door", "faults"),
    [
        (lambda folder: "fine", []),
        (lambda folder: (folder / "x").read_text(), []),
        (refuse(LoraError("too bad; try again")), []),
        (refuse(KeyError("x")), ["KeyError in no function of ours"]),
        (refuse(FaultError("left out")), ["left out"]),
        (lambda folder: "\x1b[31m", ["said a control character"]),
        (lambda folder: (folder.parent / "nowhere" / "x").write_text("x") and None, ["wrote outside of its folder"]),
        (lambda folder: Path("/etc/hostname").read_text(), ["read outside of its folder"]),
        (lambda folder: os.mkdir(folder.parent / "nowhere" / "x"), ["os.mkdir outside of its folder"]),  # noqa: PTH102
        (lambda folder: subprocess.run([sys.executable, "-V"], check=True) and None, ["subprocess.Popen"]),
        (lambda folder: str(importlib.import_module("antigravity")), ["imported what a file names"]),
        (slow, ["took too long"]),
        (hang, ["hung"]),
        (grow, ["took too much memory"]),
    ],
)  # fmt: skip
def test_what_the_engine_notices(
    door: Callable[[Path], str | None], faults: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[object, tuple[str, float]] = {
        slow: ("_SECONDS", 0.04),
        hang: ("_IDLE_S", 0.05),
        grow: ("_MEMORY", 2**23),
    }
    if limit := limits.get(door):
        monkeypatch.setattr(engine, *limit)
    found = [one.fault for one in judged(door)]
    assert set(faults) <= set(found), found
    assert faults or not found


def test_nothing_is_changed_outside_by_the_door_or_by_the_case_itself(tmp_path: Path) -> None:
    bait = tmp_path / "bait"
    bait.write_text("good")

    def through_a_link(folder: Path) -> None:
        (folder / "link").symlink_to(bait)
        (folder / "link").write_text("bad")

    def doors(rng: random.Random, folder: Path) -> Sequence[Door]:
        through_a_link(folder)
        return []

    assert [one.fault for one in judged(through_a_link)] == ["wrote outside of its folder"]
    with pytest.raises(FaultError, match="wrote outside"):
        run_case(Kind("made", 1, doors), 0)
    assert [one.fault for one in judged(lambda folder: bait.unlink())] == ["os.remove outside of its folder"]
    assert bait.read_text() == "good"
