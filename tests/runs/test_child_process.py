"""A child process from start to end."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.runs.child_process import ChildProcess
from tests.launched import LONG_S

SOURCE = Path(lorasmith.__file__).parents[1]

CODE = """
import sys, time
from lorasmith.runs.child_process import channel_of_child
channel = channel_of_child()
first, _ = channel.receive()
print("a line\\n" + "x" * 200_000 + "\\n50 %\\r100 %", file=sys.stderr)
channel.send({"type": "beat"})
channel.send({"type": "echo", **first}, b"body")
"""


class Owner:
    """Keeps what a child process tells."""

    def __init__(self) -> None:
        self.messages: list[tuple[dict[str, Any], bytes]] = []
        self.lines: list[str] = []
        self.ends: list[str] = []

    def on_message(self, head: dict[str, Any], body: bytes) -> None:
        self.messages.append((head, body))

    def on_line(self, line: str) -> None:
        self.lines.append(line)

    def on_end(self, why: str) -> None:
        self.ends.append(why)


def run(code: str, *, grace_s: float = LONG_S, silence_s: float = LONG_S) -> tuple[list[Any], list[str], list[str]]:
    owner = Owner()

    async def main() -> None:
        made = ChildProcess((sys.executable, "-c", CODE + code), owner, cwd=Path.cwd(), silence_s=silence_s)
        await made.start({"n": 1})
        while not owner.messages:
            await asyncio.sleep(0.01)
        await made.close(grace_s)

    asyncio.run(main())
    return owner.messages, owner.lines, owner.ends


def test_messages_and_lines_are_passed_on_and_its_end_once() -> None:
    messages, lines, ends = run("channel.receive(); sys.exit(7)")
    assert messages == [({"type": "echo", "n": 1}, b"body")]
    assert lines[0] == "a line" and lines[-1] == "100 %" and all(len(line) < 100_000 for line in lines)
    assert ends == ["it ended with exit status 7; its last line is 100 %"]


def test_one_that_does_not_end_is_killed() -> None:
    _, _, ends = run("time.sleep(600)", grace_s=0.2)
    assert ends[0].startswith("it did not end within 0.2 seconds;") and len(ends) == 1


def test_one_whose_output_is_no_message_is_killed() -> None:
    _, _, ends = run("import os; os.write(channel._outgoing.fileno(), b'\\xff' * 20); time.sleep(600)")
    assert len(ends) == 1 and "a message must begin with its lengths" in ends[0]


def test_environment_and_folder_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.relpath(SOURCE), "elsewhere"]))
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the base folder was imported')")
    owner = Owner()

    async def main() -> None:
        made = ChildProcess(
            (
                *(sys.executable, "-P", "-c"),
                "import os; from lorasmith.runs.child_process import channel_of_child as c; c().send({'type': 'x', "
                "'cwd': os.getcwd(), 'variable': os.environ['GIVEN'], 'secret': os.environ.get('LORASMITH_TOKEN')})",
            ),
            owner,
            cwd=tmp_path,
            silence_s=LONG_S,
            environment={"GIVEN": "yes"},
        )
        await made.start({})
        while not owner.ends:
            await asyncio.sleep(0.01)
        made.send({"type": "lost"})

    asyncio.run(main())
    found = {"type": "x", "cwd": str(tmp_path), "variable": "yes", "secret": None}
    assert owner.messages == [(found, b"")]
