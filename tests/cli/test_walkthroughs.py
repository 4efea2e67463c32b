"""The tutorials, and the remedies of docs/troubleshooting.md: their commands run in order, in one folder."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.evaluation import likeness
from lorasmith.families.locating import BUILT_IN, built_in_models
from tests.families.transformer_models import TINY

Command = Callable[..., Any]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "troubleshooting.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
NEEDLESS = ("has no faults, and there is nothing for --fix", "is complete and cannot be resumed")  # remedies
ELSEWHERE = ("serve", "models --get")  # they do not end, or download: other tests run them
SHORT: Mapping[str, Sequence[str]] = {
    "train": ("--rank", "2", "--no-previews"),
    "generate": ("--steps", "1"),
    "evaluate": ("--steps", "1", "--noises", "1", "--most", "1"),
    "run": ("--set", "Train LoRA.steps=2"),
}


def shortened(words: Sequence[str]) -> list[str]:
    """A command with fewer steps and smaller pictures; nothing else of it is changed."""
    command = re.sub(r"--steps (\d+)", lambda steps: f"--steps {int(steps[1]) // 250}", shlex.join(words))
    more = [*SHORT.get(words[0], ())]
    if words[0] == "train" and "--steps" not in words:
        more += ["--steps", "2"]
    if words[0] == "train":
        is_klein = any("klein" in one for one in words)
        more += ["--targets", "*.attn.to_q", "--resolution", "64"] if is_klein else ["--targets", "*.attn2.to_q"]
    return [*shlex.split(command), *more]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What the pages begin with: pictures, pairs of them, and models under usual names."""
    pictures = BUILT_IN_BASE / "input"
    for name in ("photos", "high", "low", "pairs/after", "pairs/before"):
        shutil.copytree(pictures / "fox", tmp_path / name)
    shutil.copytree(pictures / "high-contrast", tmp_path / "style")
    for caption in (tmp_path / "pairs" / "before").glob("*.txt"):
        caption.unlink()
    shutil.copy(pictures / "fox" / "fox_1.png", tmp_path / "photo.png")
    (tmp_path / "sd15.safetensors").symlink_to(built_in_models()[BUILT_IN])
    TINY["flux2-klein"].saved(tmp_path / "ComfyUI")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run_in_order(lorasmith: Command, place: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(one) for one in re.findall(r"^ {4,}lorasmith (.*)$", text, flags=re.MULTILINE)]
    if page.stem == "troubleshooting":
        commands.insert(0, ["train", "photos", "--model", "sd15.safetensors", "--trigger", "sks dog"])
    for words in commands:
        if shlex.join(words).startswith(ELSEWHERE) or (words[0] == "evaluate" and not likeness.is_installed()):
            continue
        ran = lorasmith(*shortened(words))
        is_found = words[0] in ("check", "data", "doctor") and ran.code == 1 and not ran.err
        is_needless = any(one in ran.err for one in NEEDLESS)
        assert ran.code == 0 or is_found or is_needless, (words, ran.out, ran.err)


@pytest.mark.slow
def test_the_network_of_the_tutorial_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tutorials/network.md").read_text("utf-8"), re.DOTALL)
    exec(compile("\n".join(blocks), "network.md", "exec"), {})
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", capsys.readouterr().out))
    assert after < before
    assert (tmp_path / "stripes.pt").is_file()
