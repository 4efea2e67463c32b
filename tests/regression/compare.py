"""What training computes here, compared bit for bit with what it computed at an earlier commit.

    python -m tests.regression.compare [--base REV] [--cases lora,flux]

The earlier commit is checked out into a temporary worktree. Both versions run this version's cases, each in one fresh
process on one CPU thread, so that the processor and the installed packages are the same for both. Losses and tensors
must agree in length, dtype, shape and bytes; NaN equals any NaN.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from tests.regression.cases import CASES, Outcome

BASE = "0feef2d"
"""The commit before the redesign of the package. It is moved forward when numbers change on purpose."""

_ROOT = Path(__file__).parents[2]


def has_commit(rev: str) -> bool:
    """Whether this repository's history has a commit; False without git or outside of a repository."""
    return shutil.which("git") is not None and _git("cat-file", "-e", f"{rev}^{{commit}}").returncode == 0


def compare(cases: Sequence[str], *, base: str = BASE) -> dict[str, str]:
    """Run cases on the commit `base` and on the working tree: case → what differs, empty where nothing does.

    Raises:
        RuntimeError: the commit cannot be checked out, or a process ended before it had run all cases.
    """
    with tempfile.TemporaryDirectory() as scratch, _worktree(Path(scratch, "worktree"), base) as tree:
        before, now = Path(scratch, "before"), Path(scratch, "now")
        _run({before: tree / "src", now: _ROOT / "src"}, cases)
        return {case: _case_difference(case, before, now) for case in cases}


def difference(before: Outcome, now: Outcome) -> str:
    """What differs between two outcomes, in words; empty where nothing does."""
    found = (_loss_difference(before.losses, now.losses), _tensors_difference(before.tensors, now.tensors))
    return "; ".join(one for one in found if one)


def _git(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(_ROOT), *map(str, arguments)], capture_output=True, text=True, check=False)


@contextlib.contextmanager
def _worktree(path: Path, rev: str) -> Iterator[Path]:
    """A worktree of a commit, removed afterwards."""
    try:
        added = _git("worktree", "add", "--detach", path, rev)
        if added.returncode:
            raise RuntimeError(f"{rev} cannot be checked out: {added.stderr.strip()}")
        yield path
    finally:
        _git("worktree", "remove", "--force", "--force", path)  # twice: also one that is locked, half made


def _run(sides: Mapping[Path, Path], cases: Sequence[str]) -> None:
    """Run cases on several versions at the same time: folder for the outcomes → folder that holds the package."""
    with contextlib.ExitStack() as stack:
        processes = {}
        for outcomes, package in sides.items():
            outcomes.mkdir()
            log = stack.enter_context((outcomes / "log").open("w", encoding="utf-8"))
            command = [sys.executable, "-m", "tests.regression.cases", str(outcomes), *cases]
            process = subprocess.Popen(command, cwd=_ROOT, env=_environment(package), stdout=log, stderr=log)
            stack.callback(_end, process)
            processes[outcomes] = process
        statuses = {outcomes: process.wait() for outcomes, process in processes.items()}
    for outcomes, status in statuses.items():
        text = (outcomes / "log").read_text(encoding="utf-8")
        if status or f"package: {sides[outcomes] / 'lorasmith'}" not in text.splitlines():
            raise RuntimeError(f"the cases did not run on {sides[outcomes]} (status {status}):\n{text[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # does nothing to a process that has ended
    process.wait()


def _environment(package: Path) -> dict[str, str]:
    """The environment of a side's process: its package and built-in model, one thread, no GPU, no network."""
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    paths = (package, package.parent / "lorasmith-tiny" / "src")
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def _case_difference(case: str, *sides: Path) -> str:
    failed = {side.name: side / f"{case}.error" for side in sides if not (side / f"{case}.pt").exists()}
    if failed:
        return "\n".join(f"failed {side}: {error.read_text(encoding='utf-8')}" for side, error in failed.items())
    before, now = (Outcome(**torch.load(side / f"{case}.pt", weights_only=True)) for side in sides)
    return difference(before, now)


def _loss_difference(before: Sequence[float], now: Sequence[float]) -> str:
    if len(before) != len(now):
        return f"{len(before)} losses before, {len(now)} now"
    changed = _changed(torch.tensor(before, dtype=torch.float64), torch.tensor(now, dtype=torch.float64))
    if not changed.any():
        return ""
    step = int(changed.nonzero()[0])
    return f"loss {step + 1} of {len(now)} was {before[step]!r}, is {now[step]!r}"


def _tensors_difference(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> str:
    if lone := sorted(before.keys() ^ now.keys()):
        return f"{len(lone)} tensors are on one side only, such as {lone[0]!r}"
    found = {name: text for name, tensor in before.items() if (text := _tensor_difference(tensor, now[name]))}
    if not found:
        return ""
    name, text = next(iter(found.items()))
    return f"{len(found)} of {len(now)} tensors differ, first {name!r}: {text}"


def _tensor_difference(before: Tensor, now: Tensor) -> str:
    if (before.dtype, before.shape) != (now.dtype, now.shape):
        return f"{before.dtype} {tuple(before.shape)} before, {now.dtype} {tuple(now.shape)} now"
    changed = _changed(before, now)
    if not changed.any():
        return ""
    largest = (before.flatten().double() - now.flatten().double())[changed].abs().max().item()
    return f"{int(changed.sum())} of {changed.numel()} values, largest difference {largest:.3g}"


def _changed(before: Tensor, now: Tensor) -> Tensor:
    """(numel,) bool: where the bytes of two tensors of one dtype and shape differ, unless both are NaN."""
    flat = [tensor.contiguous().flatten() for tensor in (before, now)]
    first, second = (one.view(torch.uint8).reshape(one.numel(), one.element_size()) for one in flat)
    return (first != second).any(1) & ~(flat[0].isnan() & flat[1].isnan())


def _main() -> int:
    parser = argparse.ArgumentParser(description="Compare what training computes with an earlier commit.")
    parser.add_argument("--base", default=BASE, metavar="REV", help="commit to compare with (default: %(default)s)")
    parser.add_argument("--cases", default=",".join(CASES), metavar="A,B", help="cases to run (default: %(default)s)")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := sorted(set(cases) - CASES.keys()):
        parser.error(f"cases must be among {', '.join(CASES)}, got {', '.join(unknown)}")
    if not has_commit(options.base):
        parser.error(f"base must be a commit of this repository, got {options.base}")
    differences = compare(cases, base=options.base)
    for case, text in differences.items():
        print(f"{case:9} {text or 'equal'}")
    equal = list(differences.values()).count("")
    print(f"{equal} of {len(differences)} equal")
    return int(equal < len(differences))


def _terminated(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)  # as an exception, so that the worktree is removed
    sys.exit(_main())
