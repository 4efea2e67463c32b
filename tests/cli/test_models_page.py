"""Commands of `docs/models.md` and `docs/cards.md`, in a ComfyUI folder with small models under the usual names."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.families.loading import load_model
from tests.families.flux_parts import comfyui_folder

Command = Callable[..., Any]

ROOT = Path(__file__).parents[2]
PAGE = "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8").replace("\\\n", " ") for name in ("models.md", "cards.md")
)
COMMANDS = re.findall(r"^    lorasmith (?!models --get|bench)(.*)$", PAGE, flags=re.MULTILINE)
SHORT = ["--steps", "1", "--rank", "2", "--targets", "*.attn.to_q", "--resolution", "64"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfyui_folder(tmp_path_factory.mktemp("page"))


@pytest.mark.slow
def test_commands_run_in_order(lorasmith: Command, photos: Path, made: Path, tmp_path: Path) -> None:
    given, *others = COMMANDS
    assert [command.split()[0] for command in COMMANDS] == ["train", "train", "models", "train", "plan"]
    for file in made.rglob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    ran = lorasmith(*shlex.split(given), *SHORT)
    assert ran.code == 0, ran.err
    assert "found in" not in ran.out
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    shutil.copytree(made, tmp_path / "ComfyUI")
    shutil.copy(tmp_path / "runs" / "photos-001" / "photos.safetensors", tmp_path / "adapter.safetensors")
    for shown in others:
        command = shown.replace("z_image_turbo_bf16", "flux1-dev")
        command = command.replace("ComfyUI/models/loras/zimage_turbo_training_adapter_v2", "adapter")
        is_run = command.startswith("train")
        ran = lorasmith(*shlex.split(command), *(SHORT if is_run else []))
        assert ran.code == 0, ran.err
        assert ("found in models/vae" in ran.out) == (is_run or command.startswith("plan"))
        assert "has no effect" not in ran.out


def test_the_call_in_python_loads_the_model(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = re.search(r"`lorasmith\.(load_model\(.*?\))`", PAGE, flags=re.DOTALL)
    assert call is not None
    files = {file.name: str(file) for file in made.rglob("*.safetensors")}
    code = re.sub(r'"([\w-]+\.safetensors)"', lambda match: repr(files[match[1]]), call[1])
    model = eval(code, {"load_model": load_model})
    assert len(model.components.modules()) == 4
