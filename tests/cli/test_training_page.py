"""What `docs/training.md` shows can be typed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    lorasmith (train .*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(lorasmith: Command, photos: Path, command: str) -> None:
    ran = lorasmith(*shlex.split(command), "--steps", "1", "--learning-rate", "1e-3")

    assert ran.code == 0, ran.err
    assert "changes nothing" not in ran.out
