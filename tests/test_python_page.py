"""docs/python.md and docs/files.md: every block of code runs, and the pages name what there is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.families.locating import BUILT_IN, built_in_models
from lorasmith.training.events import KINDS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
FILES = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")


def shortened(code: str) -> str:
    """The code with fewer steps and smaller pictures; nothing else of it is changed."""
    for pattern, short in {r"steps(=|\": )\d+": r"steps\1 2", r"validate_every=\d+": "validate_every=1"}.items():
        code = re.sub(pattern, short, code)
    return code.replace("resolution=512", "resolution=64")


def blocks(page: str) -> dict[str, str]:
    """The code below each heading."""
    found = {}
    for section in page.split("\n## ")[1:]:
        if code := "\n".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)):
            found[section.split("\n")[0]] = code
    return found


FIRST, *OTHERS = blocks(PAGE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page names."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("place")
    shutil.copy(built_in_models()[BUILT_IN], folder / "sd15.safetensors")
    for name in ("photos", "more photos"):
        shutil.copytree(BUILT_IN_BASE / "input" / "fox", folder / name)
    configs = str(BUILT_IN_BASE / "models" / "configs" / BUILT_IN)
    pipe = StableDiffusionPipeline.from_single_file(
        str(built_in_models()[BUILT_IN]), config=configs, local_files_only=True
    )
    pipe.save_pretrained(folder / "stable-diffusion-v1-5")
    return folder


@pytest.fixture(scope="module")
def begun(place: Path) -> Iterator[dict[str, Any]]:
    """Names after the first block, which is run in that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        names: dict[str, Any] = {}
        exec(compile(shortened(blocks(PAGE)[FIRST]), FIRST, "exec"), names)
        yield names


def test_the_first_run_leaves_its_files(begun: dict[str, Any], place: Path) -> None:
    assert all((place / name).is_file() for name in ("dog.safetensors", "loss.png", "runs/dog/report.html"))


@pytest.mark.slow
@pytest.mark.parametrize("heading", OTHERS)
@pytest.mark.filterwarnings("ignore::UserWarning:diffusers")
def test_every_other_block_runs_after_the_first(heading: str, begun: dict[str, Any]) -> None:
    exec(compile(shortened(blocks(PAGE)[heading]), heading, "exec"), {**begun})


def test_the_page_on_files_reads_them(begun: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for heading, code in blocks(FILES).items():
        exec(compile(code, heading, "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2"]


def test_the_page_names_everything_public() -> None:
    table = PAGE.split("| name | what it is |")[1].split("\n\n")[0]
    assert set(re.findall(r"`ls\.(\w+)`", table)) >= set(ls.__all__) - {"LorasmithError"}


def test_the_page_on_files_names_every_event_and_file(begun: dict[str, Any], place: Path) -> None:
    assert {name for name in KINDS if f"`{name}`" not in FILES} == set()
    tree = FILES.split("    runs/dog-001/\n")[1].split("\n\n")[0]
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    here = {path.name.replace("lora.", "dog.") for path in (place / "runs" / "dog").iterdir()}
    assert here <= listed


def test_files_without_a_version_are_still_read(begun: dict[str, Any], place: Path, tmp_path: Path) -> None:
    from lorasmith.training.storage.records import read_history

    for name in ("run.json", "events.jsonl"):
        lines = (place / "runs" / "dog" / name).read_text(encoding="utf-8")
        assert '"version": 1' in lines
        (tmp_path / name).write_text(re.sub(r'"version": 1,\s*', "", lines), encoding="utf-8")
    assert "version" not in json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    old, new = read_history(tmp_path), read_history(place / "runs" / "dog")
    assert (old.record, old.events, old.unreadable) == (new.record, new.events, 0)
