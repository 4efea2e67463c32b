"""A child process from start to end."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.server.child_process import ChildProcess
from tests.launched import LONG_S

SOURCE = Path(lorasmith.__file__).parents[1]

CODE = """
import sys, time
from lorasmith.server.child_process import channel_of_child
channel = channel_of_child()
first, _ = channel.receive()
print("a line\\n" + "x" * 200_000 + "\\n50 %\\r100 %", file=sys.stderr)
channel.send({"type": "beat"})
channel.send({"type": "echo", **first}, b"body")
"""


def child(code: str, ends: list[str], **settings: Any) -> tuple[ChildProcess, list[Any], list[str]]:
    messages: list[Any] = []
    lines: list[str] = []
    given: dict[str, Any] = {"silence_s": LONG_S} | settings
    made = ChildProcess(
        (sys.executable, "-c", CODE + code),
        cwd=Path.cwd(),
        on_message=lambda head, body: messages.append((head, body)),
        on_line=lines.append,
        on_end=ends.append,
        **given,
    )
    return made, messages, lines


def run(code: str, *, grace_s: float = LONG_S, **settings: Any) -> tuple[list[Any], list[str], list[str]]:
    ends: list[str] = []

    async def main() -> tuple[list[Any], list[str]]:
        made, messages, lines = child(code, ends, **settings)
        await made.start({"n": 1})
        while not messages:
            await asyncio.sleep(0.01)
        await made.close(grace_s)
        return messages, lines

    return *asyncio.run(main()), ends


def test_messages_and_lines_are_passed_on_and_its_end_once() -> None:
    messages, lines, ends = run("channel.receive(); sys.exit(7)")
    assert messages == [({"type": "echo", "n": 1}, b"body")]
    assert lines[0] == "a line" and lines[-1] == "100 %" and all(len(line) < 100_000 for line in lines)
    assert ends == ["it ended with exit status 7"]


def test_one_that_does_not_end_is_killed() -> None:
    _, _, ends = run("time.sleep(600)", grace_s=0.2)
    assert ends == ["it did not end within 0.2 seconds"]


def test_one_whose_output_is_no_message_is_killed() -> None:
    _, _, ends = run("import os; os.write(channel._outgoing.fileno(), b'\\xff' * 20); time.sleep(600)")
    assert len(ends) == 1 and "a message must begin with its lengths" in ends[0]


def test_environment_and_folder_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.relpath(SOURCE), "elsewhere"]))
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the base folder was imported')")
    messages: list[Any] = []

    async def main() -> None:
        ended = asyncio.Event()
        made = ChildProcess(
            (
                *(sys.executable, "-P", "-c"),
                "import os; from lorasmith.server.child_process import channel_of_child as c; c().send({'type': 'x', "
                "'cwd': os.getcwd(), 'variable': os.environ['GIVEN'], 'secret': os.environ.get('LORASMITH_TOKEN')})",
            ),
            cwd=tmp_path,
            silence_s=LONG_S,
            on_message=lambda head, body: messages.append(head),
            on_line=lambda line: None,
            on_end=lambda why: ended.set(),
            environment={"GIVEN": "yes"},
        )
        await made.start({})
        await ended.wait()
        made.send({"type": "lost"})

    asyncio.run(main())
    assert messages == [{"type": "x", "cwd": str(tmp_path), "variable": "yes", "secret": None}]
