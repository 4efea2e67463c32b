"""Real processes of a run, on gloo: what they gather from each other, threads of one process cannot."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from lorasmith.core.launched import LaunchedProcess
from lorasmith.core.processes import Processes, joined
from tests.launched import LONG_S, free_port

T = TypeVar("T")


def processes_together(size: int, one: Callable[[Processes], T], *, within_s: float = LONG_S) -> list[T]:
    """Run a function in each of several processes; returns what each of them returns, by rank."""
    found = outcomes_together(size, one, within_s=within_s)
    errors = [one for one in found if isinstance(one, BaseException)]
    for error in sorted(errors, key=lambda one: "gloo" in str(one)):  # those are of processes that lost another
        raise error
    return found


def outcomes_together(size: int, one: Callable[[Processes], Any], *, within_s: float = LONG_S) -> list[Any]:
    """As `processes_together`, but an error is returned, and None of a process that died."""
    port = free_port()
    # Forked, so that models and what a test has replaced are there at once.
    context: Any = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    children = []
    for rank, (_, end) in enumerate(pipes):
        children.append(context.Process(target=_run, args=(rank, size, port, one, end), daemon=True))
        children[-1].start()
        end.close()
    found: list[Any] = [None] * size
    try:
        waiting = {receiving: rank for rank, (receiving, _) in enumerate(pipes)}
        until = time.monotonic() + within_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
            assert ready, f"processes {sorted(waiting.values())} do not end within {within_s:g} s"
            for each in ready:
                assert isinstance(each, Connection)
                rank = waiting.pop(each)
                try:
                    found[rank] = pickle.loads(each.recv_bytes())
                except EOFError:
                    found[rank] = None
    finally:
        for child in children:
            child.kill()
            child.join()
    return found


def _run(rank: int, size: int, port: int, one: Callable[[Processes], Any], end: Connection) -> None:
    torch.set_num_threads(1)
    result: Any
    try:
        with joined(LaunchedProcess(rank, size, rank, "127.0.0.1", port)) as processes:
            result = one(processes)
    except BaseException as error:
        result = error.with_traceback(None)
        result.__cause__ = result.__context__ = None
    end.send_bytes(pickle.dumps(result))
