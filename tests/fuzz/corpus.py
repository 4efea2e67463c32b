"""The cases that ended badly once: lines of kind and seed, with what happened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.fuzz.engine import Finding

CORPUS = Path(__file__).with_name("corpus.txt")


def remembered() -> list[tuple[str, int]]:
    """Kind and seed of each case."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines() if CORPUS.exists() else []
    words = [line.split("#")[0].split() for line in lines]
    return [(kind, int(seed)) for kind, seed in filter(None, words)]


def remember(findings: Iterable[Finding]) -> None:
    """Add a case of each fault that the corpus has no case of."""
    known = CORPUS.read_text(encoding="utf-8").splitlines() if CORPUS.exists() else []
    faults = {line.partition("# ")[2] for line in known}
    for one in findings:
        if one.summary not in faults:
            faults.add(one.summary)
            known.append(f"{one.kind} {one.seed}  # {one.summary}")
    CORPUS.write_text("".join(f"{line}\n" for line in known), encoding="utf-8")
