"""Hosts of runs in tests."""

from __future__ import annotations

from collections.abc import Callable

from lorasmith.runs.run import Host
from lorasmith.training.events import Event


class Audience(Host):
    """Collects events, passes them to `also`, and asks a run to stop once a step is done."""

    def __init__(self, stop_at: int | None = None, *, also: Callable[[Event], object] = lambda event: None) -> None:
        self.events: list[Event] = []
        self._stop_at, self._also = stop_at, also

    def __call__(self, event: Event) -> None:
        self.on_event(event)

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        self._also(event)

    def cancelled(self) -> bool:
        return self._stop_at is not None and any(getattr(event, "step", 0) >= self._stop_at for event in self.events)

    def names(self) -> list[str]:
        return list(dict.fromkeys(type(event).__name__ for event in self.events))


class NoFiles(Audience):
    """Of runs that write files into an output alone."""

    runs = None
