"""Fuzzes for a number of cases or minutes, or repeats one case.

    python -m tests.fuzz --cases 100000 --minutes 60 --jobs 2
    python -m tests.fuzz --kind lora --seed 17

Cases that end badly are added to corpus.txt, which the tests repeat. The exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere

from tests.fuzz.corpus import remember, remembered
from tests.fuzz.engine import Finding, run_case
from tests.fuzz.kinds import KINDS, cases, prepare
from tests.fuzz.processes import Result, results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="number of cases; those of the corpus come first")
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--kind", choices=sorted(KINDS), help="only this kind")
    parser.add_argument("--seed", type=int, help="only this seed of --kind")
    parser.add_argument("--start", type=int, default=0, help="first seed of each kind")
    parser.add_argument("--keep", action="store_true", help="do not add to the corpus")
    asked = parser.parse_args()
    if asked.seed is not None:
        if asked.kind is None:
            parser.error("--seed needs --kind")
        prepare()
        found = run_case(KINDS[asked.kind], asked.seed)
        print(*(found or ["nothing"]), sep="\n")
        return bool(found)
    known = [case for case in remembered() if asked.kind in (None, case[0])]
    todo = [*known, *cases(asked.cases - len(known), only=asked.kind, start=asked.start)]
    findings = _report(results(todo, asked.jobs, time.monotonic() + 60 * asked.minutes))
    if not asked.keep:
        remember(findings)
    return bool(findings)


def _report(results: Iterable[Result]) -> list[Finding]:
    """Print each fault when it is first found, then the split by kind and the number of cases of each; returns all."""
    counts: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    findings: list[Finding] = []
    same: defaultdict[tuple[str, str], list[Finding]] = defaultdict(list)
    started = time.monotonic()
    for kind, taken, found in results:
        counts[kind] += 1
        seconds[kind] += taken
        findings += found
        for one in found:
            same[kind, one.summary].append(one)
            if len(same[kind, one.summary]) == 1:
                print(one, flush=True)
        if sum(counts.values()) % 5000 == 0:
            print(f"{sum(counts.values()):,} cases, {len(findings)} findings", flush=True)
    for kind, count in counts.items():
        bad = len({one.seed for one in findings if one.kind == kind})
        print(f"{kind:<12}{count:>8,} cases {seconds[kind]:>8.1f} s of processor time {bad:>6} bad")
    print(f"{sum(counts.values()):,} cases in {time.monotonic() - started:.0f} s")
    for ones in sorted(same.values(), key=len, reverse=True):
        print(f"{len(ones):>6} × {ones[0]}")
    return findings


if __name__ == "__main__":
    sys.exit(main())
