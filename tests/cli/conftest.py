"""Commands run as people run them: through `main`, in a folder of their own, output and exit code caught."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorasmith.cli import console as console_module
from lorasmith.cli.main import main


@dataclass(frozen=True)
class Ran:
    """What a command left on the screen."""

    code: int
    out: str
    err: str


@pytest.fixture
def lorasmith(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)
    # Wide enough that no sentence is broken where a test looks for it.
    monkeypatch.setattr(console_module.console, "width", 400)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["lorasmith", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        caught = capsys.readouterr()
        return Ran(code, caught.out, caught.err)

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures, two with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 255, (80, 64 + 32 * (index == 3), 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )
    (folder / "0.txt").write_text("a cat on a mat", encoding="utf-8")
    (folder / "1.txt").write_bytes("a café".encode("latin-1"))
    return folder
