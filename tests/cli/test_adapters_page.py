"""What `docs/adapters.md` shows can be typed, and what it says of the algorithms is what the catalogue says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.adapters.catalogue import ALGORITHMS
from tests.covering import slow_except

Command = Callable[..., Any]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    lorasmith (.*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("command", slow_except(COMMANDS, *COMMANDS[::4]))
def test_commands_run(lorasmith: Command, photos: Path, command: str) -> None:
    arguments = shlex.split(command)
    if "--existing-lora" in arguments:
        assert lorasmith("train", photos, "--model", "lorasmith-tiny", "--steps", 1).code == 0
    if arguments[0] == "train":
        arguments += ["--steps", "1", "--learning-rate", "1e-3"]
    ran = lorasmith(*arguments)
    assert ran.code == 0, ran.err
    assert "has no effect" not in ran.out


def test_the_python_example_runs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    code = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert code is not None
    exec(compile(code[1].replace("steps=500", "steps=1"), "adapters.md", "exec"), {})


def test_the_table_is_the_catalogues() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == list(ALGORITHMS)
    for name, summary, rank, _, rate in rows:
        factor = ALGORITHMS[name].learning_rate_factor
        assert rate == ("the model's" if factor == 1 else f"{factor:g} × the model's")
        assert summary == ALGORITHMS[name].summary
        assert rank.removeprefix("the ").replace("not used", "") == ALGORITHMS[name].rank_meaning


def test_each_variant_is_in_the_table_with_its_algorithms() -> None:
    variants = sorted(frozenset().union(*(facts.variants for facts in ALGORITHMS.values())))
    for name in variants:
        row = re.search(rf"^\| `--{name.replace('_', '-')}\b.*? \| (.*?) \|", PAGE, flags=re.MULTILINE)
        assert row is not None, name
        assert row[1].split(", ") == [kind for kind, facts in ALGORITHMS.items() if name in facts.variants]
