"""Lines about progress where no bar is drawn: what is done and what is left, at most every 30 seconds.

While nothing is reported, as in a long pass over a large model, a thread prints the last state with the time since the
beginning. Commands, graphs and the library's functions print theirs with this class.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable

from lorasmith.core.errors import OptionError
from lorasmith.core.printable import time_text

PROGRESS_VARIABLE = "LORASMITH_PROGRESS_SECONDS"
"""Environment variable: seconds between lines about progress where no bar is drawn."""


class ProgressLines:
    """Rate-limited lines about an activity.

    show: prints a line; it is also called from another thread.
    state: what is printed after a while if nothing is reported.
    is_complete: whether the last report is always printed.
    """

    def __init__(
        self,
        show: Callable[[str], object],
        state: str = "",
        *,
        is_complete: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show, self._is_complete, self._clock = show, is_complete, clock
        self._every_s = seconds_between_lines()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.begin(state)
        threading.Thread(target=self._beats, name="progress", daemon=True).start()

    def begin(self, state: str) -> None:
        """Another activity begins now, of which nothing is reported yet; without a `state` none does."""
        with self._lock:
            self._began = self._last = self._clock()
            self._state, self._waiting, self._done = state, False, 0.0

    def report(self, line: str, done: float = 0.0) -> None:
        """Print the line if one is due; else keep it as the pending line. `done` is the share done, if known."""
        with self._lock:
            self._state, self._waiting, self._done = line, True, done
            if self._is_due:
                self._print(line + self._left)

    def beat(self) -> None:
        """Print the state if a line is due."""
        with self._lock:
            if self._state and self._is_due and not self._ended.is_set():
                self._print(f"{self._state}, {time_text(self._clock() - self._began)} so far{self._left}")

    def end(self) -> None:
        """Print the pending line, if any; nothing more is printed until the next report."""
        with self._lock:
            if self._waiting and self._is_complete:
                self._print(self._state)
            self._state, self._last = "", self._clock()

    def close(self) -> None:
        """`end`, for good."""
        self.end()
        self._ended.set()

    @property
    def _is_due(self) -> bool:
        return self._clock() - self._last >= self._every_s

    @property
    def _left(self) -> str:
        if not 0 < self._done < 1:
            return ""
        return f", about {time_text((self._clock() - self._began) * (1 / self._done - 1))} left"

    def _print(self, line: str) -> None:
        self._waiting, self._last = False, self._clock()
        self._show(line)

    def _beats(self) -> None:
        while not self._ended.wait(max(1.0, self._every_s)):
            self.beat()


def seconds_between_lines() -> float:
    """OptionError if the environment variable is set to anything but a positive number."""
    text = os.environ.get(PROGRESS_VARIABLE) or "30"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise OptionError(f"{PROGRESS_VARIABLE} must be a number of seconds above 0, got {text!r}; such as 30")
    return seconds
