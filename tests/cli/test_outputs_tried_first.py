"""Every command that writes refuses an output that cannot be written before it loads a model or reads a picture."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.families import loading
from lorasmith.formats.lora_file import save_lora
from tests.cli.conftest import Ran
from tests.cli.test_lora_commands import lora

FOX, TINY = BUILT_IN_BASE / "input" / "fox", "lorasmith-tiny"


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that refuse new files, also those of root; work that begins fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for place in ("families.loading.load_model", "data.folder.scan_sources", "runs.data_check.check_folder"):
        monkeypatch.setattr(f"lorasmith.{place}", work)
    assert loading.load_model is work


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", FOX, "--model", TINY),
        ("train", FOX, "--model", TINY, "--output", "out"),
        ("demo",),
        ("sweep", "sweep.toml"),
        ("run", "example:single_subject"),
        ("generate", "--model", TINY, "--prompt", "a fox"),
        ("merge", "dog.safetensors", "dog.safetensors", "--output", "out.safetensors"),
        ("resize", "dog.safetensors", "--rank", "2", "--output", "out.safetensors"),
        ("convert", "dog.safetensors", "--to", "comfy", "--output", "out.safetensors"),
        ("data", "check", FOX, "--fix", "out"),
        ("data", "check", FOX, "--report", "page.html"),
        ("data", "caption", FOX, "--with", "nothing"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
@pytest.mark.usefixtures("read_only")
def test_outputs_are_tried_first(
    lorasmith: Callable[..., Ran], tmp_path: Path, tiny: Any, arguments: tuple[object, ...]
) -> None:
    save_lora(tmp_path / "dog.safetensors", lora(tiny), tiny.names)
    (tmp_path / "sweep.toml").write_text(f'model = "{TINY}"\nsources = "{FOX}"\n[grid]\nrank = [2, 4]\n')
    ran = lorasmith(*arguments)
    assert ran.code == 1 and "cannot be written (Read-only file system)" in ran.err, ran.err + ran.out
