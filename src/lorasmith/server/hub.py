"""Notices from jobs to whoever listens: sockets, event streams, tests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

NoticeKind: TypeAlias = Literal["job", "queue", "graph", "training", "log"]

MOST_WAITING = 1_000
"""Notices that wait for a reader; one that leaves more unread is cut off."""

_SLOW = 50
"""Unread notices from which a reader is slow: droppable ones are replaced by newer ones."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something that happened.

    Attributes:
        kind: `job`: its state changed, `data` is its summary. `queue`: `{"pending": n, "running": n}`. `graph`: an
            event of `workflow.execution_events`, whose class is `data["event"]`. `training`: an event of training or of
            its preparation, likewise, with `node_id` inside graphs. `log`: a line, `{"t": ISO time, "m": text}`.
        job_id: of the job, if it is about one.
        data: JSON values.
        binary: an encoded picture (JPEG or PNG), such as a preview.
        client_id: of the client that submitted the job.
        droppable: whether a newer one replaces it, such as progress.
    """

    kind: NoticeKind
    data: dict[str, Any] = field(default_factory=dict)
    job_id: str | None = None
    binary: bytes | None = None
    client_id: str | None = None
    droppable: bool = False

    @property
    def subject(self) -> tuple[Any, ...] | None:
        """What a droppable notice is about; one of the same subject replaces it. None: it is never replaced."""
        if not self.droppable or self.kind == "log":
            return None
        has_picture = self.binary is not None  # a preview is not replaced by a mere number
        return self.kind, self.job_id, self.data.get("event"), self.data.get("node_id"), has_picture


class Subscription:
    """Notices for one reader, as an asynchronous iterator; it ends when it is closed or cut off.

    Args:
        wants: whether a notice is for this reader.
        most: notices that wait for it at most.
        on_close: called once, with the subscription.

    Attributes:
        cut_off: whether it has ended because its reader was too slow.
    """

    def __init__(
        self,
        wants: Callable[[Notice], bool],
        *,
        most: int = MOST_WAITING,
        on_close: Callable[[Subscription], object] = lambda one: None,
    ) -> None:
        self._wants = wants
        self._most = most
        self._on_close = on_close
        self._waiting: deque[Notice] = deque()
        self._arrived = asyncio.Event()
        self._is_closed = False
        self.cut_off = False

    def put(self, notice: Notice) -> None:
        """Add a notice, if it is for this reader."""
        if self._is_closed or not self._wants(notice):
            return
        if len(self._waiting) >= _SLOW and notice.subject is not None:
            self._remove(lambda one: one.subject == notice.subject)
        if len(self._waiting) >= self._most and not self._remove(lambda one: one.droppable):
            self.cut_off = True
            self._waiting.clear()
            self.close()
            return
        self._waiting.append(notice)
        self._arrived.set()

    def close(self) -> None:
        """End the subscription; notices that wait are still read."""
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
        """Remove the oldest waiting notice that matches; whether there was one."""
        for place, one in enumerate(self._waiting):
            if match(one):
                del self._waiting[place]
                return True
        return False


class Hub:
    """Passes notices to all subscriptions. Used from the event loop's thread alone."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []
        self._is_closed = False

    def publish(self, notice: Notice) -> None:
        """Pass a notice on. It never waits."""
        for one in tuple(self._subscriptions):
            one.put(notice)

    def subscribe(
        self,
        *,
        kinds: Collection[NoticeKind] | None = None,
        job_id: str | None = None,
        wants: Callable[[Notice], bool] = lambda notice: True,
        most: int = MOST_WAITING,
    ) -> Subscription:
        """A subscription from now on; close it, or use it as a context manager.

        Args:
            kinds: of notices; None for all.
            job_id: only notices about this job.
            wants: whether a notice is wanted, besides.
            most: notices that wait for the reader at most.
        """

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
        """End all subscriptions."""
        self._is_closed = True
        for one in tuple(self._subscriptions):
            one.close()

    def _forget(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
