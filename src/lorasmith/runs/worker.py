"""The worker process: `python -m lorasmith.runs.worker`, started by a `Supervisor`. It runs one job at a time, or a
group that trains together; without a device it answers questions instead.

One thread receives messages, another sends heartbeats, the main thread works. If the supervisor exits, the jobs are
cancelled, so that their runs are saved, and the process ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from lorasmith.core.cancellation import answering, check_wanted
from lorasmith.core.errors import CancelledError, LorasmithError, OutputError
from lorasmith.core.fence import fenced
from lorasmith.core.files import locked
from lorasmith.core.folders import Folders
from lorasmith.core.processor import let_threads_sleep
from lorasmith.runs.child_process import BlockingChannel, channel_of_child

if TYPE_CHECKING:
    import torch

_KINDS = {"runs": "lorasmith.runs.training_jobs", "server": "lorasmith.server.worker_jobs"}
"""Modules with `job_kinds(work)`, and `answers(start)` if they answer, by the name in the start message."""

_LOCK_PAUSE_S = 0.1
_MARGIN_S = 5.0
_THREADS = 8  # questions at once
_PROGRESS_S = 0.3
_MODULE = "lorasmith.runs.worker"

Ended: TypeAlias = Callable[[str, Mapping[str, Any]], None]
"""Reports the end of a job by its id: `state`, and `outputs`, `error` and others as `JobStore.finish`."""


class JobKind(Protocol):
    """Runs jobs of a kind, one message after another."""

    def run(self, jobs: Sequence[Mapping[str, Any]], ended: Ended) -> None:
        """Run the jobs of a message: one, unless they train together. Calls `ended` once for each."""

    def free(self) -> None:
        """Release what is kept for the next job."""


class Work(NamedTuple):
    """What kinds of jobs need of their process."""

    start: Mapping[str, Any]  # first message of the supervisor
    channel: BlockingChannel
    cancelled: threading.Event  # set to stop the current jobs

    def folders(self) -> Folders:
        """The folders of models and images, read again for each job. Raises OptionError, as `Folders.load`."""
        return folders_of_start(self.start)


def folders_of_start(start: Mapping[str, Any]) -> Folders:
    """The `Folders` that a start message names. Raises OptionError, as `Folders.load`."""
    extra = start["extra_model_paths"]
    return Folders.load(
        Path(start["base"]),
        extra_model_paths=None if extra is None else Path(extra),
        follow_links=start["follow_links"],
    )


def how_it_ended(run: Callable[[], Mapping[str, Any]], *, job: str, log: str) -> dict[str, Any]:
    """Run a job, which returns `outputs` and others, and return its end, whatever it raises."""
    from lorasmith.core.allocator import is_out_of_memory

    try:
        return {"state": "completed", **run()}
    except CancelledError as error:
        return {"state": "cancelled", "error": {"kind": "CancelledError", "message": str(error)}}
    except LorasmithError as error:
        found = {"kind": type(error).__name__, "message": str(error), "details": getattr(error, "details", None)}
        return {"state": "failed", "error": {key: value for key, value in found.items() if value is not None}}
    except BaseException as error:
        logging.getLogger("lorasmith").error("job %s failed:\n%s", job, traceback.format_exc())
        kind = "InternalError"
        text = f"the job failed ({type(error).__name__}: {error}), which is a bug; the log is {log}"
        if is_out_of_memory(error):
            kind = "OutOfMemory"
            text = "memory ran out; choose a smaller resolution, batch_size or rank, a quantization, or offloading"
        lines = traceback.format_exception(error)[-20:]
        return {"state": "failed", "error": {"kind": kind, "message": str(LorasmithError(text)), "traceback": lines}}


def main() -> None:
    """Work until the supervisor closes the channel."""
    let_threads_sleep()
    channel = channel_of_child()
    started = channel.receive()
    if started is None:
        return
    start, _ = started
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    inbox = _Inbox(channel, grace_s=start["grace_s"], overdue=lambda: os._exit(1))
    threading.Thread(target=_beat, args=(channel, start["beat_s"], inbox), daemon=True).start()
    with _alone(start.get("lock"), channel, inbox, grace_s=start["grace_s"]) as is_alone:
        if is_alone:
            channel.send({"type": "loading"})
            _work(channel, start, inbox)
    # The interpreter's normal exit would wait for threads of libraries.
    sys.stderr.flush()
    os._exit(0)


def _work(channel: BlockingChannel, start: dict[str, Any], inbox: _Inbox) -> None:
    with _kept_for_good():
        module = importlib.import_module(_KINDS[start["kinds"]])
    if start.get("device") is None:
        with _kept_for_good():
            answer = module.answers(start)
        channel.send({"type": "ready"})
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="question")
        while (message := inbox.next()) is not None:
            threads.submit(_reply, channel, inbox, message, answer, str(start["log"]))
        return
    from lorasmith.core.allocator import keep_freed_memory

    keep_freed_memory()
    kinds: Mapping[str, JobKind] = module.job_kinds(Work(start, channel, inbox.cancel))
    device = device_of(start)
    channel.send({"type": "ready", "device": _memory(device)})
    while (message := inbox.next()) is not None:
        if message["type"] == "free":
            _free(kinds)
            continue
        if message["type"] == "warm":
            with _kept_for_good():
                module.warm(kinds)
            continue
        if not _run(kinds, message["jobs"], channel, device):
            logging.getLogger("lorasmith").error("the device is not usable any more; the worker is replaced")
            return
        with contextlib.suppress(OSError):  # the supervisor has exited
            channel.send({"type": "ready", "device": _memory(device)})


@contextlib.contextmanager
def _kept_for_good() -> Iterator[None]:
    """What is made inside the context, such as modules, the garbage collector does not look through.

    It would do so again and again, in an eighth of the time of imports, and find nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _run(
    kinds: Mapping[str, JobKind], jobs: Sequence[Mapping[str, Any]], channel: BlockingChannel, device: torch.device
) -> bool:
    """Run the jobs of a message and report their ends; returns whether the device is still usable."""
    kind = kinds[jobs[0]["kind"]]
    _free({name: other for name, other in kinds.items() if other is not kind})
    failed = set()

    def ended(id: str, end: Mapping[str, Any]) -> None:
        if end["state"] == "failed":
            failed.add(end["error"]["kind"])
        with contextlib.suppress(OSError):  # the supervisor has exited
            channel.send({"type": "ended", "id": id, **end})

    with contextlib.ExitStack() as held:
        if (note := jobs[0].get("fence")) is not None:
            held.enter_context(fenced(Path(note), jobs[0]["attempt"]))
        kind.run(jobs, ended)
    if "OutOfMemory" in failed:
        _free(kinds)
    return not failed or _is_usable(device)


def _free(kinds: Mapping[str, JobKind]) -> None:
    for kind in {id(kind): kind for kind in kinds.values()}.values():
        kind.free()


def device_of(start: Mapping[str, Any]) -> torch.device:
    """The device of a worker: its only visible GPU, or another one."""
    import torch

    from lorasmith.core.placement import best_device

    return torch.device("cuda") if start["device"].startswith("cuda") else best_device()


def _memory(device: torch.device) -> dict[str, Any]:
    import psutil
    import torch

    if device.type != "cuda":
        memory = psutil.virtual_memory()
        return {"memory_bytes": memory.total, "free_bytes": memory.available}
    free, total = torch.cuda.mem_get_info()
    return {
        "memory_bytes": total,
        "free_bytes": free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(),
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
    }


def _is_usable(device: torch.device) -> bool:
    """Whether a device works in this process, which it does not after an illegal memory access."""
    import torch

    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except (RuntimeError, MemoryError):
        return False


def _reply(
    channel: BlockingChannel, inbox: _Inbox, asked: dict[str, Any], answer: Callable[[str, Any], Any], log: str
) -> None:
    body = b""
    try:
        with answering(inbox.given_up(asked["number"]), _ProgressMessages(channel, asked["number"])):
            check_wanted()
            value = answer(asked["question"], asked["arguments"])
        result = {"is_bytes": True} if isinstance(value, bytes) else {"result": value}
        body = value if isinstance(value, bytes) else b""
    except OSError as error:
        result = _refusal("OutputError", f"a file cannot be used: {error}")
    except LorasmithError as error:
        details = getattr(error, "details", None) or list(getattr(error, "findings", ())) or None
        result = _refusal(type(error).__name__, str(error), details)
    except BaseException as error:  # a bug: the question fails, the process continues
        logging.getLogger("lorasmith").error("%s failed:\n%s", asked["question"], traceback.format_exc())
        name = type(error).__name__
        result = _refusal("InternalError", f"the server failed ({name}: {error}); its log is {log}")
    finally:
        inbox.answered(asked["number"])
    with contextlib.suppress(OSError):  # the supervisor has exited
        channel.send({"type": "answer", "number": asked["number"], **result}, body)


class _ProgressMessages:
    """Sends how far the answer to a question is, a few times a second, and the end."""

    def __init__(self, channel: BlockingChannel, number: int) -> None:
        self._channel, self._number, self._last = channel, number, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= _PROGRESS_S:
            self._last = now
            with contextlib.suppress(OSError):  # the supervisor has exited
                self._channel.send({"type": "progress", "number": self._number, "done": done, "total": total})


def _refusal(kind: str, message: str, details: Any = None) -> dict[str, Any]:
    return {"error": {"kind": kind, "message": message, "details": details}}


class _Inbox:
    """Messages of the supervisor: jobs and questions are queued, their ends are heard at once. `overdue` is called if
    the jobs have not ended `grace_s` seconds after the supervisor exited.
    """

    def __init__(self, channel: BlockingChannel, *, grace_s: float, overdue: Callable[[], object]) -> None:
        self._channel = channel
        self._overdue = overdue
        self._grace_s = grace_s
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._current: set[str] = set()
        self._asked: dict[int, threading.Event] = {}  # open questions; set when nobody waits for the answer
        self.cancel = threading.Event()
        self.is_closed = False
        threading.Thread(target=self._receive, daemon=True).start()

    def next(self) -> dict[str, Any] | None:
        """The next message; None after the supervisor has exited."""
        message = self._waiting.get()
        return None if self.is_closed else message

    def given_up(self, number: int) -> threading.Event:
        """Set when nobody waits for the answer to a question any more."""
        return self._asked[number]

    def answered(self, number: int) -> None:
        self._asked.pop(number, None)

    def close(self) -> None:
        """The supervisor has exited: stop the jobs, and end the process even if they do not."""
        if not self.is_closed:
            self.is_closed = True
            self.cancel.set()
            self._waiting.put(None)
            timer = threading.Timer(self._grace_s, self._overdue)
            timer.daemon = True
            timer.start()

    def _receive(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                head, _ = message
                if head["type"] == "cancel":
                    if head["id"] in self._current:
                        self.cancel.set()
                    continue
                if head["type"] == "give up":
                    if (question := self._asked.get(head["number"])) is not None:
                        question.set()
                    continue
                if head["type"] == "ask":
                    self._asked[head["number"]] = threading.Event()
                if head["type"] == "jobs":  # the supervisor sends one message at a time
                    self._current = {job["id"] for job in head["jobs"]}
                    self.cancel.clear()
                self._waiting.put(head)
        finally:
            self.close()


def _beat(channel: BlockingChannel, seconds: float, inbox: _Inbox) -> None:
    while True:
        try:
            channel.send({"type": "beat"})
        except (OSError, ValueError):
            inbox.close()
            return
        time.sleep(seconds)


@contextlib.contextmanager
def _alone(name: str | None, channel: BlockingChannel, inbox: _Inbox, *, grace_s: float) -> Iterator[bool]:
    """Inside the context, no other worker has the lock of this name; yields False if the supervisor exits first. Waits
    for a worker of an earlier supervisor to save its run, and kills it after its grace.
    """
    if name is None:
        yield True
        return
    lock = Path(name)
    note, since, is_told = lock.with_suffix(".pid"), time.monotonic(), False
    while not inbox.is_closed:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(lock, "locked"))
            except OutputError as error:
                if not str(error).startswith("locked"):
                    raise
            else:
                with contextlib.suppress(OSError):  # a full disk
                    note.write_text(str(os.getpid()))
                yield True
                return
        if not is_told:
            channel.send({"type": "waiting"})
            is_told = True
        if time.monotonic() - since > grace_s + _MARGIN_S:
            _end_other(note)
            since = time.monotonic()
        time.sleep(_LOCK_PAUSE_S)
    yield False


def _end_other(note: Path) -> None:
    """Kill the process whose id is in a file, if it is a worker."""
    import psutil

    with contextlib.suppress(OSError, ValueError, psutil.Error):
        other = psutil.Process(int(note.read_text()))
        if _MODULE in other.cmdline():
            other.kill()


if __name__ == "__main__":
    main()
