"""Publishes notices from jobs to subscribers: sockets and event streams. Lines of the log are among them.

The log is that of child processes and packages: the last lines are in memory, all of them in a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from aiohttp.http import HttpProcessingError

from lorasmith.core.files import ensure_folder
from lorasmith.core.printable import printable

if TYPE_CHECKING:
    from lorasmith.runs.queue import Job

NoticeKind: TypeAlias = Literal["job", "queue", "dataset", "check", "draft", "graph", "view", "progress", "log"]

MOST_WAITING = 1_000  # unread notices after which a subscription is cut off

_SLOW = 50  # unread notices after which views and droppable ones are replaced by newer ones
_MOST_VIEWS = 64


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A change of a job, the queue, a dataset, a draft or the log.

    `job`: its state changed, `data` is its summary. `queue`: `{"pending": n, "running": n}`. `dataset`: its pictures or
    captions changed, `{"name"}`. `check`: how many images of one are checked, `{"name", "done", "total"}`.
    `draft`: what is chosen for a training, `{"dataset", "draft", "version"}`. `graph`: an event of
    `workflow.execution_events`, whose class is `data["event"]`. `view`: `{"node_id", "view"}`, a `runs.view.RunView` as
    JSON, with the id of its node inside graphs. `progress`: `{"value", "maximum"}` of a drawing. `log`: a line,
    `{"t": ISO time, "m": text}`.
    """

    kind: NoticeKind
    data: dict[str, Any] = field(default_factory=dict)  # JSON values
    job_id: str | None = None
    binary: bytes | None = None  # JPEG or PNG, such as a preview
    client_id: str | None = None  # that submitted the job
    droppable: bool = False  # a newer one may replace it, such as progress

    @property
    def subject(self) -> tuple[Any, ...] | None:
        """A notice is replaced by a later one with the same subject, as by a later view; None: never."""
        if self.kind == "view":
            return self.kind, self.job_id, self.data["node_id"]
        if not self.droppable or self.kind == "log":
            return None
        has_picture = self.binary is not None  # a number must not replace a preview
        return self.kind, self.job_id, self.data.get("event"), self.data.get("node_id"), has_picture


class SentViews:
    """The views that a reader has received, so that only changes are sent."""

    def __init__(self) -> None:
        self._sent: dict[tuple[Any, ...], dict[str, Any]] = {}

    def changes(self, notice: Notice) -> dict[str, Any]:
        """The entries of a view that differ from those sent before: all of the first one."""
        view: dict[str, Any] = notice.data["view"]
        key = notice.job_id, notice.data["node_id"]
        before = self._sent.pop(key, {})
        self._sent[key] = view
        if len(self._sent) > _MOST_VIEWS:
            del self._sent[next(iter(self._sent))]
        return {name: value for name, value in view.items() if name not in before or value != before[name]}


class Subscription:
    """Notices for one reader, as an asynchronous iterator. It ends when it is closed, or with `cut_off` after `most`
    unread notices. `on_close` is called once.
    """

    def __init__(
        self,
        wants: Callable[[Notice], bool],
        *,
        most: int = MOST_WAITING,
        on_close: Callable[[Subscription], object] = lambda subscription: None,
    ) -> None:
        self._wants = wants
        self._most = most
        self._on_close = on_close
        self._waiting: deque[Notice] = deque()
        self._arrived = asyncio.Event()
        self._is_closed = False
        self.cut_off = False

    def put(self, notice: Notice) -> None:
        """Add a notice if `wants` accepts it."""
        if self._is_closed or not self._wants(notice):
            return
        if len(self._waiting) >= _SLOW and notice.subject is not None:
            self._remove(lambda waiting: waiting.subject == notice.subject)
        if len(self._waiting) >= self._most and not self._remove(lambda waiting: waiting.droppable):
            self.cut_off = True
            self._waiting.clear()
            self.close()
            return
        self._waiting.append(notice)
        self._arrived.set()

    def close(self) -> None:
        """End the subscription; queued notices can still be read."""
        if not self._is_closed:
            self._is_closed = True
            self._arrived.set()
            self._on_close(self)

    def __len__(self) -> int:
        return len(self._waiting)

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Notice:
        while not self._waiting:
            if self._is_closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.popleft()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove(self, match: Callable[[Notice], bool]) -> bool:
        """Remove the oldest queued notice that matches; returns whether there was one."""
        for place, notice in enumerate(self._waiting):
            if match(notice):
                del self._waiting[place]
                return True
        return False


class Hub:
    """Passes notices to all subscriptions, and keeps the last views. Use it in the event loop's thread only."""

    def __init__(self) -> None:
        self._views: dict[tuple[Any, ...] | None, Notice] = {}  # by subject, of the last jobs
        self._subscriptions: list[Subscription] = []
        self._is_closed = False

    def publish(self, notice: Notice) -> None:
        """Never blocks."""
        if notice.kind == "view":
            self._views[notice.subject] = notice
            if len(self._views) > _MOST_VIEWS:
                del self._views[next(iter(self._views))]
        for subscription in tuple(self._subscriptions):
            subscription.put(notice)

    def views(self, job_id: str) -> list[Notice]:
        """The last view of each node of a job that has reported any lately."""
        return [view for view in self._views.values() if view.job_id == job_id]

    def subscribe(
        self,
        *,
        kinds: Collection[NoticeKind] | None = None,
        job_id: str | None = None,
        wants: Callable[[Notice], bool] = lambda notice: True,
        most: int = MOST_WAITING,
    ) -> Subscription:
        """A subscription to some kinds of notices (None: all), optionally of one job; close it after use."""

        def all_wanted(notice: Notice) -> bool:
            return (
                (kinds is None or notice.kind in kinds)
                and (job_id is None or notice.job_id == job_id)
                and wants(notice)
            )

        subscription = Subscription(all_wanted, most=most, on_close=self._forget)
        if self._is_closed:
            subscription.close()
        else:
            self._subscriptions.append(subscription)
        return subscription

    def close(self) -> None:
        self._is_closed = True
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def _forget(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)


_REMEMBERED = 500
_LONGEST = 4_000
_MOST_BYTES = 10 * 2**20


class LogBook:
    """The log of a server; `entries` are the last lines, each `{"t": ISO time, "m": text}`. At 10 MiB the file at
    `path` (None for none) is renamed to `<name>.1`. The hub receives each line as a `log` notice. With `as_json` a line
    of the file is an object `{t, source, m, jobs}`, and changes of jobs are such lines, too.
    """

    def __init__(self, path: Path | None, hub: Hub, *, as_json: bool = False) -> None:
        self.path = path
        self._as_json = as_json
        self._hub = hub
        self.entries: deque[dict[str, str]] = deque(maxlen=_REMEMBERED)
        if path is not None:
            ensure_folder(path.parent)

    @contextlib.contextmanager
    def receiving(self, *packages: str) -> Iterator[None]:
        """Inside the context, log records of packages are added here instead of printed, except errors of clients, such
        as malformed requests. Use it in the event loop's thread.
        """
        loop = asyncio.get_running_loop()
        handler = _Handler(lambda text: loop.call_soon_threadsafe(self.add, "server", text))
        loggers = [logging.getLogger(name) for name in packages]
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
                logger.propagate = True

    def add(self, source: str, text: str, *, jobs: Sequence[str] = ()) -> None:
        """Add the lines of a text; `source` is the name of the process, `jobs` are the ids of what it runs."""
        for line in text.splitlines():
            entry = {"t": _now(), "m": printable(line, limit=_LONGEST)}
            self.entries.append(entry)
            self._write(f"{entry['t']} {source}: {entry['m']}", {"source": source, **entry, "jobs": list(jobs)})
            self._hub.publish(Notice(kind="log", data=entry, droppable=True))

    def note_job(self, job: Job) -> None:
        """Add a change of a job to the file, if its lines are objects; also what is not sent to readers of the log."""
        if self._as_json:
            facts = {name: getattr(job, name) for name in ("kind", "state", "attempts", "device", "run")}
            message = str((job.error or {}).get("message", ""))
            self._write("", {"source": "queue", "t": _now(), "m": message, "jobs": [job.id], **facts})

    def _write(self, line: str, facts: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with contextlib.suppress(OSError):  # a full disk costs log entries, not the server
            if self.path.exists() and self.path.stat().st_size > _MOST_BYTES:
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write((json.dumps(facts) if self._as_json else line) + "\n")


def _now() -> str:
    return datetime.now().isoformat(timespec="milliseconds")


class _Handler(logging.Handler):
    def __init__(self, receive: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._receive = receive

    def emit(self, record: logging.LogRecord) -> None:
        if not record.exc_info or not isinstance(record.exc_info[1], (HttpProcessingError, ConnectionError)):
            self._receive(self.format(record))
