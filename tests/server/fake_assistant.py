"""An assistant without torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from lorasmith.runs.child_process import channel_of_child


def main() -> None:
    channel = channel_of_child()
    start, _ = channel.receive() or sys.exit(0)
    channel.send({"type": "ready"})
    held: list[dict[str, Any]] = []
    given_up: list[int] = []
    while (message := channel.receive()) is not None:
        head, _ = message
        if head["type"] == "give up":
            given_up.append(head["number"])
            continue
        answer = {"type": "answer", "number": head["number"]}
        given = head["arguments"]
        match head["question"]:
            case "echo":
                channel.send({**answer, "result": given})
            case "held echo":
                held.append({**answer, "result": given})
            case "slow echo":
                channel.send({**answer, "result": given})
            case "release":
                for one in (*held, {**answer, "result": None}):
                    channel.send(one)
            case "given up":
                channel.send({**answer, "result": given_up})
            case "counted":
                for done in (1, 2):
                    channel.send({"type": "progress", "number": head["number"], "done": done, "total": 2})
                channel.send({**answer, "result": None})
            case "picture":
                channel.send({**answer, "is_bytes": True}, b"\x00picture")
            case "refuse":
                error = {"kind": "GraphError", "message": "no such node", "details": ["node 1"]}
                channel.send({**answer, "error": error})
            case "die once":
                note = Path(start["base"], "died")
                if not note.exists():
                    note.touch()
                    os._exit(3)
                channel.send({**answer, "result": "alive"})
            case "die":
                os._exit(3)
            case "evaluation_afterwards":
                channel.send({**answer, "result": {"run": given["id"], "do": "wait"}})
            case "devices":
                channel.send({**answer, "result": [{"name": "cpu", "title": "CPU", "memory_bytes": 1}]})


main()
