"""The assistant process: `python -m lorasmith.server.questions.answering`, started by the server."""

from __future__ import annotations

import logging
import os
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lorasmith.core.errors import LorasmithError
from lorasmith.server.child_process import BlockingChannel, channel_of_child
from lorasmith.server.server_config import folders_of_child

_THREADS = 4


def main() -> None:
    """Answer questions until the server closes the channel."""
    channel = channel_of_child()
    started = channel.receive()
    if started is None:
        return
    start, _ = started
    threading.Thread(target=_beat, args=(channel, start["beat_s"]), daemon=True).start()
    from lorasmith.server.questions.question_registry import load_questions

    load_questions()
    channel.send({"type": "ready"})
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="question") as threads:
        while (message := channel.receive()) is not None:
            threads.submit(_reply, channel, message[0], start)
        # The answers to open questions would not be read.
        threads.shutdown(wait=False, cancel_futures=True)
        os._exit(0)


def _reply(channel: BlockingChannel, head: dict[str, Any], start: dict[str, Any]) -> None:
    from lorasmith.server.questions.question_registry import answer

    number = head["number"]
    try:
        found = answer(head["question"], head["arguments"], folders_of_child(start))
        if isinstance(found, bytes):
            channel.send({"type": "answer", "number": number, "is_bytes": True}, found)
        else:
            channel.send({"type": "answer", "number": number, "result": found})
    except OSError as error:
        _refuse(channel, number, "OutputError", f"a file cannot be used: {error}")
    except LorasmithError as error:
        details = getattr(error, "details", None) or list(getattr(error, "findings", ())) or None
        _refuse(channel, number, type(error).__name__, str(error), details)
    except BaseException as error:  # a bug: the question fails, the assistant continues
        logging.getLogger("lorasmith").error("%s failed:\n%s", head["question"], traceback.format_exc())
        name = type(error).__name__
        _refuse(channel, number, "InternalError", f"the server failed ({name}: {error}); its log is {start['log']}")


def _refuse(channel: BlockingChannel, number: int, kind: str, message: str, details: Any = None) -> None:
    error = {"kind": kind, "message": message, "details": details}
    try:
        channel.send({"type": "answer", "number": number, "error": error})
    except OSError:  # the server has exited
        os._exit(0)


def _beat(channel: BlockingChannel, seconds: float) -> None:
    """Send heartbeats; the process exits when the server has."""
    pause = threading.Event()
    while True:
        try:
            channel.send({"type": "beat"})
        except OSError:
            os._exit(0)
        pause.wait(seconds)


if __name__ == "__main__":
    main()
