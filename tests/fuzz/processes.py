"""Cases in processes of their own, so that one that crashes or takes all memory ends none but its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tests.fuzz.engine import Finding, run_case
from tests.fuzz.kinds import KINDS, prepare

Case = tuple[str, int]
Result = tuple[str, float, list[Finding]]
"""Kind, processor time in seconds, findings."""

_CHUNK = 20
_HEADROOM = 6 * 2**30
"""Address space in bytes beyond that of a process at its start, so that a bad case cannot take all of a machine's."""

_trace = Path(os.devnull)
"""The file in which a process says which case it is at."""


def results(todo: list[Case], jobs: int, until: float) -> Iterator[Result]:
    """The results of cases, in any order, until the time is over or a process dies."""
    chunks = [todo[at : at + _CHUNK] for at in range(0, len(todo), _CHUNK)]
    with (
        tempfile.TemporaryDirectory() as traces,
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _prepared, (traces,)) as pool,
    ):
        try:
            futures = [pool.submit(_results_of, chunk) for chunk in chunks]
            for future in as_completed(futures, timeout=max(0.0, until - time.monotonic())):
                yield from future.result()
        except TimeoutError:
            print("The time is over.")
        except BrokenProcessPool:
            died = [word for file in Path(traces).iterdir() if (word := file.read_text())]
            print("A process died in one of these cases:", *died)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepared(traces: str) -> None:
    """Prepare a process, and limit its memory where the system can."""
    global _trace  # noqa: PLW0603  of this process
    prepare()
    _trace = Path(traces) / str(os.getpid())
    if sys.platform == "linux":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _HEADROOM, resource.RLIM_INFINITY))


def _results_of(chunk: list[Case]) -> list[Result]:
    return [_result_of(*case) for case in chunk]


def _result_of(kind: str, seed: int) -> Result:
    _trace.write_text(f"{kind} {seed}")
    started = time.process_time()
    try:
        found = run_case(KINDS[kind], seed)
    except Exception as error:  # of the kind, which could not write its files
        error.add_note(f"in the case {kind} {seed}")
        raise
    taken = time.process_time() - started
    _trace.write_text("")
    return kind, taken, found
