"""The server's side of the assistant: questions for code that imports torch, answered by another process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from lorasmith.core.errors import LorasmithError
from lorasmith.runs.supervisor import RestartedProcess, WorkerConfig


class RefusedError(LorasmithError):
    """A question raised an error in the assistant: the error's class name as `kind` (`InternalError` for a bug), its
    message, and JSON `details`, such as findings.
    """

    def __init__(self, kind: str, message: str, details: Any = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = str(self)
        self.details = details


class UnavailableError(LorasmithError):
    """The assistant cannot answer now."""


class Assistant:
    """A worker without a device; `on_line` receives each line of its log."""

    def __init__(self, config: WorkerConfig, *, on_line: Callable[[str], None] = lambda line: None) -> None:
        self._log = config.log
        self.on_line = on_line
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[Mapping[str, Any], asyncio.Future[Any], int]] = {}
        self._process = RestartedProcess(config, self, {})
        self._is_stopping = False
        self.is_ready = False  # questions wait until it is

    async def start(self) -> None:
        """Start the process; it is ready some seconds later."""
        await self._process.start()

    async def stop(self) -> None:
        """Stop the process; open questions fail."""
        self._is_stopping = True
        for _, answer, _ in self._open.values():
            _fail(answer, "the server is stopping; try again")
        self._open.clear()
        await self._process.stop(grace_s=2)

    async def ask(self, question: str, **arguments: Any) -> Any:
        """Call a function of `server.questions` with JSON arguments; returns a JSON value, or bytes. Raises
        RefusedError if the call fails, and UnavailableError if the process ends twice during it or the server stops.
        """
        if self._is_stopping:
            raise UnavailableError("the server is stopping; start it again")
        number = next(self._numbers)
        head = {"type": "ask", "question": question, "arguments": arguments}
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[number] = head, answer, 0
        if self.is_ready:
            self._process.send({**head, "number": number})
        try:
            return await answer
        finally:
            self._open.pop(number, None)

    def on_message(self, head: dict[str, Any], body: bytes) -> None:
        if head["type"] == "ready":
            self.is_ready = True
            for number, (asked, *_) in self._open.items():
                self._process.send({**asked, "number": number})
        if head["type"] != "answer":
            return
        _, answer, _ = self._open.get(head["number"], (None, None, 0))
        if answer is None or answer.done():  # the caller was cancelled
            return
        if (error := head.get("error")) is not None:
            answer.set_exception(RefusedError(error["kind"], error["message"], error.get("details")))
        else:
            answer.set_result(body if head.get("is_bytes") else head.get("result"))

    def on_end(self, why: str) -> None:
        was_ready, self.is_ready = self.is_ready, False
        if self._is_stopping:
            return
        self.on_line(f"the assistant ended: {why}; it is started again")
        for number, (head, answer, failures) in list(self._open.items()):
            if failures or not was_ready:
                _fail(answer, f"the server's assistant ended ({why}); try again, the log is {self._log}")
                self._open.pop(number)
            else:  # retried once
                self._open[number] = head, answer, failures + 1


def _fail(answer: asyncio.Future[Any], message: str) -> None:
    if not answer.done():
        answer.set_exception(UnavailableError(message))
