"""The server's side of the assistant: questions for code that imports torch, answered by another process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from lorasmith.core.errors import LorasmithError
from lorasmith.server.child_process import ChildProcess, RestartPause
from lorasmith.server.server_config import ServerConfig


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
    """The assistant process, restarted whenever it ends; `on_line` receives each line of its log."""

    def __init__(self, config: ServerConfig, *, on_line: Callable[[str], None] = lambda line: None) -> None:
        self._config = config
        self._on_line = on_line
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[Mapping[str, Any], asyncio.Future[Any], int]] = {}
        self._child: ChildProcess | None = None
        self._ready = asyncio.Event()
        self._pause = RestartPause()
        self._is_stopping = False
        self._restart: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Questions wait until it is."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Start the process; it is ready some seconds later. Raises OSError."""
        child = ChildProcess(
            self._config.assistant_command,
            cwd=self._config.base,
            silence_s=self._config.silence_s,
            on_message=self._on_message,
            on_line=self._on_line,
            on_end=self._on_end,
        )
        self._child = child
        await child.start(self._config.first_message)
        for number, (head, *_) in self._open.items():
            child.send({**head, "number": number})

    async def stop(self) -> None:
        """Stop the process; open questions fail."""
        self._is_stopping = True
        if self._restart is not None:
            self._restart.cancel()
        self._fail_all("the server is stopping")
        if self._child is not None:
            await self._child.close(grace_s=2)

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
        if self._child is not None:
            self._child.send({**head, "number": number})
        try:
            return await answer
        finally:
            self._open.pop(number, None)

    def _on_message(self, head: dict[str, Any], body: bytes) -> None:
        if head["type"] == "ready":
            self._pause.reset()
            self._ready.set()
            return
        _, answer, _ = self._open.get(head["number"], (None, None, 0))
        if answer is None or answer.done():  # the caller was cancelled
            return
        if (error := head.get("error")) is not None:
            answer.set_exception(RefusedError(error["kind"], error["message"], error.get("details")))
        else:
            answer.set_result(body if head.get("is_bytes") else head.get("result"))

    def _on_end(self, why: str) -> None:
        was_ready = self._ready.is_set()
        self._ready.clear()
        self._child = None
        if self._is_stopping:
            return
        self._on_line(f"the assistant ended: {why}; it is started again")
        for number, (head, answer, failures) in list(self._open.items()):
            if failures or not was_ready:
                self._fail(answer, f"the server's assistant ended ({why}); try again, the log is {self._config.log}")
                self._open.pop(number)
            else:  # retried once
                self._open[number] = head, answer, failures + 1
        self._restart = asyncio.create_task(self._start_again())

    async def _start_again(self) -> None:
        await self._pause.wait()
        try:
            await self.start()
        except OSError as error:
            self._on_end(f"it cannot be started, {error}")

    def _fail_all(self, why: str) -> None:
        for _, answer, _ in self._open.values():
            self._fail(answer, f"{why}; try again")
        self._open.clear()

    def _fail(self, answer: asyncio.Future[Any], message: str) -> None:
        if not answer.done():
            answer.set_exception(UnavailableError(message))
