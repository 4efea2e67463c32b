"""The processes that train one run together: how many there are, which this one is, and what they tell each other.

One process alone has every operation too, and none of them does anything. `current` is what the process belongs to;
`joined` makes it one of several, on torch.distributed, whose package is imported then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorasmith.core.errors import LorasmithError, TrainingError
from lorasmith.core.launch_environment import LaunchedProcess

__all__ = ["ALONE", "Processes", "current", "joined"]

T = TypeVar("T")

_FAULT = "lorasmith/fault"
"""Key of what a process reports, before its rank."""

_MEETING = timedelta(minutes=5)
"""How long a process waits for the others at the start."""

_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: the first one draws previews and saves while they wait."""


class Processes:
    """The processes of a run, seen from one of them; this base class is one process alone.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process among those of its machine: the device that it trains on.
    """

    rank = 0
    size = 1
    local_rank = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def summing(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to add a tensor up over all processes, in place; the result is there after calling what is returned.

        Every process must begin the same sums in the same order. The result has the same bits in all of them.
        """
        return lambda: None

    def summed(self, numbers: Sequence[int]) -> list[int]:
        """The sum of each whole number over all processes, without waiting for the device."""
        return list(numbers)

    def gathered(self, value: T) -> list[T]:
        """The value of each process, in the order of their ranks."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes; its LorasmithError is raised in all of them."""
        return make()

    def report(self, fault: str) -> None:
        """Leave word of why this process ends the run, for the others to find: they may wait for it in a sum."""

    @property
    def reported(self) -> str:
        """Why another process has ended the run, empty if none has."""
        return ""

    def lost(self, error: BaseException) -> TrainingError:
        """The error to raise where a sum or the like failed because another process has ended."""
        reason = self.reported or str(error).strip().splitlines()[0]
        return TrainingError(
            f"all processes of a run must go on together, but another one has ended ({reason}); its own message says "
            "why, and the same command continues the run"
        )

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the context, then all others at once: they find what it has made."""
        if not self.is_first:
            self.gathered(None)
        yield
        if self.is_first:
            self.gathered(None)


ALONE = Processes()


class _Joined(Processes):
    """Several processes on torch.distributed: sums of tensors on their device, all else on the host."""

    def __init__(self, launched: LaunchedProcess) -> None:
        self.rank = launched.rank
        self.size = launched.size
        self.local_rank = launched.local_rank

    def summing(self, tensor: Tensor) -> Callable[[], object]:
        from torch import distributed

        with self._others_needed():
            work = distributed.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with self._others_needed():
                work.wait()

        return wait

    def summed(self, numbers: Sequence[int]) -> list[int]:
        counts = torch.tensor(list(numbers), dtype=torch.int64)
        self.summing(counts)()
        return [int(count) for count in counts]

    def gathered(self, value: T) -> list[T]:
        from torch import distributed

        found: list[Any] = [None] * self.size
        with self._others_needed():
            distributed.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        from torch import distributed

        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except LorasmithError as error:
                made[1] = error
        with self._others_needed():
            distributed.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]  # type: ignore[no-any-return]

    def report(self, fault: str) -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # the store may have ended with its process
            self._store.set(f"{_FAULT}/{self.rank}", fault)

    @property
    def reported(self) -> str:
        with contextlib.suppress(RuntimeError, ValueError):
            for rank in range(self.size):
                if rank != self.rank and self._store.check([key := f"{_FAULT}/{rank}"]):
                    return f"process {rank}: {self._store.get(key).decode()}"
        return ""

    @property
    def _store(self) -> Any:
        from torch.distributed import distributed_c10d

        return distributed_c10d._get_default_store()

    @contextlib.contextmanager
    def _others_needed(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error) from error


_joined: list[Processes] = []


def current() -> Processes:
    """The processes that this one belongs to; one alone outside of `joined`."""
    return _joined[-1] if _joined else ALONE


@contextlib.contextmanager
def joined(launched: LaunchedProcess | None) -> Iterator[Processes]:
    """Inside the context, this process is one of those that were launched together.

    Args:
        launched: from `launched_process`; None for a process of its own.

    Raises:
        TrainingError: the others cannot be reached.
    """
    if launched is None or launched.size == 1:
        yield ALONE
        return
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() > launched.local_rank
    if on_gpus:
        torch.cuda.set_device(launched.local_rank)
    is_made = distributed.is_initialized()  # by Ray Train, say
    try:
        if not is_made:
            meeting = rendezvous(launched.meeting_point, launched.rank, launched.size, timeout=_MEETING)
            store, rank, size = next(iter(meeting))
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
                # An elastic agent keeps its store when it starts processes again, with the addresses of the dead ones.
                store=distributed.PrefixStore(launched.attempt, store),  # type: ignore[attr-defined]
                rank=rank,
                world_size=size,
                timeout=_MEETING,
            )
        distributed.distributed_c10d._set_pg_timeout(_PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"the {launched.size} processes of a run must reach each other at {launched.address}, but process "
            f"{launched.rank} cannot ({reason}); check the address and the firewall, or choose another port"
        ) from error
    _joined.append(_Joined(launched))
    try:
        yield _joined[-1]
    finally:
        _joined.pop()
        if not is_made:
            distributed.destroy_process_group()
