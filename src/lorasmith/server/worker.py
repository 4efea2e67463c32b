"""The worker process: `python -m lorasmith.server.worker`, started by the server. It runs one job at a time.

One thread receives messages, another sends heartbeats, the main thread works. If the server exits, the job is
cancelled, so that its run is saved, and the process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorasmith.core.errors import CancelledError, LorasmithError, OutputError
from lorasmith.core.files import locked
from lorasmith.server.child_process import BlockingChannel, channel_of_child

_LOCK_PAUSE_S = 0.1
_MARGIN_S = 5.0
_MODULE = "lorasmith.server.worker"


def main() -> None:
    """Work until the server closes the channel."""
    channel = channel_of_child()
    started = channel.receive()
    if started is None:
        return
    start, _ = started
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    inbox = _Inbox(channel, grace_s=start["grace_s"], overdue=lambda: os._exit(1))
    threading.Thread(target=_beat, args=(channel, start["beat_s"], inbox), daemon=True).start()
    with _alone(Path(start["lock"]), channel, inbox, grace_s=start["grace_s"]) as is_alone:
        if is_alone:
            channel.send({"type": "loading"})
            _work(channel, start, inbox)
    # The interpreter's normal exit would wait for threads of libraries.
    sys.stderr.flush()
    os._exit(0)


def _work(channel: BlockingChannel, start: dict[str, Any], inbox: _Inbox) -> None:
    from lorasmith.core.allocator import keep_freed_memory
    from lorasmith.server.worker_jobs import Jobs

    keep_freed_memory()
    jobs = Jobs(channel, start, cancel=inbox.cancel)
    channel.send({"type": "ready", "device": jobs.device()})
    while (message := inbox.next()) is not None:
        if message["type"] == "free":
            jobs.free(models=message["models"], memory=message["memory"])
            continue
        end = _ended(jobs, message, start)
        broken = jobs.is_broken() if end["state"] == "failed" else False
        with contextlib.suppress(OSError):  # the server has exited
            channel.send({"type": "ended", "id": message["id"], "device": {} if broken else jobs.device(), **end})
        if broken:
            logging.getLogger("lorasmith").error("the device is not usable any more; the worker is replaced")
            return


def _ended(jobs: Any, message: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """Run a job and return its end message, whatever it raises."""
    from lorasmith.core.allocator import is_out_of_memory

    try:
        return {"state": "completed", **jobs.run(message)}
    except CancelledError as error:
        end = {"state": "cancelled", "error": {"kind": "CancelledError", "message": str(error)}}
    except LorasmithError as error:
        end = {"state": "failed", "error": {"kind": type(error).__name__, "message": str(error)}}
    except BaseException as error:
        logging.getLogger("lorasmith").error("job %s failed:\n%s", message["id"], traceback.format_exc())
        text = f"the job failed ({type(error).__name__}: {error}), which is a bug; the log is {start['log']}"
        kind = "InternalError"
        if is_out_of_memory(error):
            kind = "OutOfMemory"
            text = "memory ran out; choose a smaller resolution, batch_size or rank, a quantization, or offloading"
            jobs.free(models=True, memory=True)
        message_text = str(LorasmithError(text))
        end = {"state": "failed", "error": {"kind": kind, "message": message_text, "traceback": _lines(error)}}
    return {**end, **jobs.rest(end)}


def _lines(error: BaseException) -> list[str]:
    return traceback.format_exception(error)[-20:]


class _Inbox:
    """Messages of the server: jobs are queued, a cancel takes effect at once. `overdue` is called if the job has not
    ended `grace_s` seconds after the server exited.
    """

    def __init__(self, channel: BlockingChannel, *, grace_s: float, overdue: Callable[[], object]) -> None:
        self._channel = channel
        self._overdue = overdue
        self._grace_s = grace_s
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._current: str | None = None
        self.cancel = threading.Event()
        self.is_closed = False
        threading.Thread(target=self._receive, daemon=True).start()

    def next(self) -> dict[str, Any] | None:
        """The next job or request; None after the server has exited."""
        message = self._waiting.get()
        return None if self.is_closed else message

    def close(self) -> None:
        """The server has exited: stop the job, and end the process even if the job does not."""
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
                    if head["id"] == self._current:
                        self.cancel.set()
                    continue
                if head["type"] == "job":  # the server sends one at a time
                    self._current = head["id"]
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
def _alone(lock: Path, channel: BlockingChannel, inbox: _Inbox, *, grace_s: float) -> Iterator[bool]:
    """Inside the context, no other worker of this folder and number runs; yields False if the server exits first. Waits
    for a worker of an earlier server to save its run, and kills it after its grace.
    """
    note, since, said = lock.with_suffix(".pid"), time.monotonic(), False
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
        if not said:
            channel.send({"type": "waiting"})
            said = True
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
