"""The examples of docs/lora-files.md do what the page says, and the load matrix is the one that was measured."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import matrix_page
import pytest
import torch

from lorasmith.cli.main import main
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.families.model import Model
from lorasmith.formats.container import write_safetensors
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import PORTABLE, load_lora

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "lora-files.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `dog.safetensors`, in which the page's examples run."""
    path = next(path for path in tiny.names.denoiser if path.endswith("attn1.to_q"))
    out, inside = tiny.names.weight_shapes[path]
    weights = AdapterWeights("lora", {"down": torch.ones(4, inside), "up": torch.ones(out, 4)}, 2.0)
    tensors = LAYOUTS["kohya"].write(AdapterState({ModuleRef(DENOISER, path): weights}), tiny.names)
    # The stale hash spoils nothing, and is something that can be mended.
    write_safetensors(tmp_path / "dog.safetensors", tensors, {"sshs_model_hash": "0" * 64})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(folder: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        program, *arguments = shlex.split(command.replace("sd15.safetensors", "lorasmith-tiny"))
        assert program == "lorasmith"
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, command
    assert len(load_lora(folder / "dog-for-peft", tiny.names).adapters) == 1
    assert len(load_lora(folder / "dog-for-peft-portable.safetensors", tiny.names).adapters) == 1
    assert (folder / "mended.safetensors").is_file()


def test_the_python_example_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert code is not None
    exec(compile(code[1].replace("sd15.safetensors", "lorasmith-tiny"), "lora-files.md", "exec"), {})
    assert "1 modules;" in capsys.readouterr().out
    assert (folder / "dog-diffusers.safetensors").is_file()


def test_every_layout_is_in_the_table() -> None:
    assert {*LAYOUTS, PORTABLE} == set(re.findall(r"^\| `([\w-]+)` \|", PAGE, flags=re.MULTILINE))


def test_the_matrix_is_drawn_from_the_record() -> None:
    record = json.loads(matrix_page.RECORD.read_text(encoding="utf-8"))
    assert matrix_page.PAGE.read_text(encoding="utf-8") == matrix_page.page(record)
