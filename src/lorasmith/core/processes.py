"""The processes that train one run together, and their collective operations.

With a single process every operation is a no-op. `current` is the group that this process belongs to; `joined` makes it
one of several, on torch.distributed, whose package is imported then.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lorasmith.core.errors import CancelledError, LorasmithError, OptionError, TrainingError
from lorasmith.core.launched import LaunchedProcess

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_FAULT = "fault"  # prefix, before the rank, of failure reasons in the store of a start

_ERRORS = "errors"  # number of errors, in the same store

_ENDED = "lorasmith/ended"
"""Key in the store of all starts: the run has ended with an error, which would recur."""

_MEETING = timedelta(minutes=5)  # how long a process waits for the others at the start

_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others later: rank 0 draws previews and saves while they wait."""


class _OtherEndedError(TrainingError):
    """Another process has ended, for a reason that is known there."""

    exit_code = 75  # EX_TEMPFAIL: the same command may succeed


class Processes:
    """The processes of a run, seen from one of them; this base class is a single process."""

    rank = 0
    size = 1
    gpu = 0  # index of this process's GPU, if any, among those that it sees

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def summing(self, tensor: Tensor) -> Callable[[], object]:
        """Start an in-place all-reduce (sum) of a tensor; calling the result waits for it.

        Every process must start the same sums in the same order. The result has the same bits in all of them.
        """
        return lambda: None

    def summed(self, numbers: Sequence[int]) -> list[int]:
        """The sum of each integer over all processes, without waiting for the device."""
        return list(numbers)

    def gathered(self, value: T) -> list[T]:
        """The value of each process, by rank."""
        return [value]

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """The value that `make` returns on rank 0; its LorasmithError is raised in all processes."""
        return make()

    def report(self, fault: str) -> None:
        """Publish this process's failure reason for the others, which may be waiting for it in a sum."""

    @property
    def reported(self) -> str:
        """The failure reason of another process, empty if there is none."""
        return ""

    def lost(self, error: BaseException) -> TrainingError:
        """The error to raise if a collective operation failed because another process has ended."""
        if reported := self.reported:
            return _OtherEndedError(
                f"all processes of a run must continue together, but another has ended ({reported}); the same command "
                "continues the run"
            )
        return _OtherEndedError(
            "all processes of a run must continue together, but another one was killed, or cannot be reached "
            f"({_reason(error)}); unless the launcher starts them again, the same command continues the run"
        )

    @contextlib.contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Rank 0 enters the context first, then the rest, which find what it has made."""
        if not self.is_first:
            self.gathered(None)
        yield
        if self.is_first:
            self.gathered(None)


ALONE = Processes()


class _Joined(Processes):
    """Several processes on torch.distributed: tensors are summed on their device, all else on the host."""

    def __init__(self, launched: LaunchedProcess, gpu: int, store: Store, starts: Store) -> None:
        self.rank = launched.rank
        self.size = launched.size
        self.gpu = gpu
        self._store = store
        self._starts = starts
        self._of_first: LorasmithError | None = None

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

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
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
            self._of_first = None if self.is_first else made[1]
            raise made[1]
        return made[0]  # type: ignore[no-any-return]

    def is_printed_elsewhere(self, error: LorasmithError) -> bool:
        """Whether another process prints this or the same error; call it for each error that ends this process."""
        if error is self._of_first:
            return True
        try:
            if isinstance(error, _OtherEndedError):
                return self._store.add(_ERRORS, 1) > 1
            self._store.add(_ERRORS, 1)
            if not isinstance(error, CancelledError):
                self._starts.set(_ENDED, "")
            return self._store.add(hashlib.sha256(str(error).encode()).hexdigest(), 1) > 1
        except RuntimeError:  # the store has ended with its process
            return False

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

    @contextlib.contextmanager
    def _others_needed(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error) from error


_REASONS = {
    r"closed by peer|reset by peer|broken pipe|end of file": "the connection was closed",
    r"refused": "the connection was refused",
    r"time[d]?[ -]?out": "it did not answer in time",
    r"resolve|name or service|getaddrinfo|no such host": "the name has no address",
    r"unreachable|no route": "no network leads there",
    r"address already in use": "the port is in use",
}
"""Failure messages of torch, gloo and NCCL (regular expressions) in our words."""


def _reason(error: BaseException) -> str:
    found = (reason for text, reason in _REASONS.items() if re.search(text, str(error), re.IGNORECASE))
    return next(found, type(error).__name__)


def _backend(gpu: int | None) -> str:
    from torch import distributed

    if gpu is None:
        return "gloo"
    return f"cpu:gloo,cuda:{'nccl' if distributed.is_nccl_available() else 'gloo'}"  # Windows has no NCCL


_joined: list[Processes] = []


def current() -> Processes:
    """The processes that this one belongs to; `ALONE` outside of `joined`."""
    return _joined[-1] if _joined else ALONE


@contextlib.contextmanager
def joined(launched: LaunchedProcess | None) -> Iterator[Processes]:
    """Inside the context, this process is one of those launched together; None for a single process.

    Raises TrainingError if the others cannot be reached. A LorasmithError raised inside has `is_printed_elsewhere` set
    if another process prints it.
    """
    if launched is None or launched.size == 1:
        yield ALONE
        return
    from torch import distributed
    from torch.distributed import distributed_c10d
    from torch.distributed.distributed_c10d import PrefixStore

    from lorasmith.core.launched import INTERFACE, interface_towards_others, opened_store, store_of_this_start

    gpu = _gpu_of(launched.local_rank, torch.cuda.device_count())
    if gpu is not None:
        torch.cuda.set_device(gpu)
    with contextlib.ExitStack() as stack:
        starts: Store
        store: Store
        interface = ""
        try:
            if distributed.is_initialized():  # by Ray Train, say
                store = starts = PrefixStore("lorasmith", distributed_c10d._get_default_store())
            else:
                starts = opened_store(launched, _MEETING)
                if starts.check([_ENDED]):
                    error = TrainingError("the run has ended with the error above; the same command continues it")
                    error.is_printed_elsewhere = True
                    raise error
                store = store_of_this_start(starts, launched, _MEETING)
                interface = stack.enter_context(interface_towards_others(store, launched))
                distributed.init_process_group(
                    _backend(gpu), store=store, rank=launched.rank, world_size=launched.size, timeout=_MEETING
                )
                stack.callback(distributed.destroy_process_group)
            # The first is public, since torch 2.15.
            (getattr(distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout)(_PATIENCE)
        except (RuntimeError, ValueError, OSError) as error:
            by = f" over {interface}" if interface else ""
            raise TrainingError(
                f"the {launched.size} processes of a run must reach each other at {launched.address}, but process "
                f"{launched.rank} cannot{by} ({_reason(error)}); check the address and the firewall, choose another "
                f"port, or name the network interface in {INTERFACE}"
            ) from error
        _joined.append(here := _Joined(launched, gpu or 0, store, starts))
        try:
            _check_gpus(here.gathered(None if gpu is None else str(torch.cuda.get_device_properties(gpu).uuid)))
            yield here
            here.gathered(None)  # if the first one dies while it saves the result, all start again
        except LorasmithError as error:
            error.is_printed_elsewhere = here.is_printed_elsewhere(error)
            raise
        finally:
            _joined.pop()


def _gpu_of(local_rank: int, count: int) -> int | None:
    """The GPU of a process; it sees all GPUs of its machine, or only its own."""
    return local_rank % count if count else None


def _check_gpus(gpus: Sequence[str | None]) -> None:
    """Raise OptionError if processes share a GPU (`found` holds UUIDs, None without one), which NCCL cannot."""
    for rank, gpu in enumerate(gpus):
        if gpu is not None and gpu in gpus[:rank]:
            raise OptionError(
                f"each process of a run must have a GPU of its own, but process {rank} has that of process "
                f"{gpus.index(gpu)}; start as many on a machine as it has GPUs"
            )
