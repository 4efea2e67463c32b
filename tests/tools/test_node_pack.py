"""The node pack by the rules of ComfyUI's registry."""

from __future__ import annotations

import re
import shutil
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import release
from tools.node_pack import PACK, check_pack, write_pack

ADDRESS = "https://example.org/lorasmith"
EPOCH = 1_700_000_000

pytestmark = pytest.mark.skipif(not (release.ROOT / PACK).is_dir(), reason="an sdist is without the pack")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The pack as a release has it."""
    shutil.copytree(release.ROOT / PACK, tmp_path / PACK, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(release.ROOT / "pyproject.toml", tmp_path)
    release.stamp(tmp_path, ADDRESS)
    return tmp_path / PACK


def test_it_keeps_the_rules_and_is_the_same_bytes_again(folder: Path, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        write_pack(folder, tmp_path / name, EPOCH)
    check_pack(tmp_path / "a.zip", ADDRESS)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as files:
        names = files.namelist()
    assert {"__init__.py", "pyproject.toml", "LICENSE", "web/docs/LorasmithTrainLora/zh.md"} < set(names)
    assert not [name for name in names if name.startswith(("proof", ".comfyignore"))]


def replaced(old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "pyproject.toml"
        text = file.read_text("utf-8")
        assert old in text
        file.write_text(text.replace(old, new), "utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced('"lorasmith-nodes"', '"ComfyUI-nodes"'), "must be without ComfyUI"),
        (replaced('"lorasmith-nodes"', '"lora--nodes"'), "a letter first"),
        (replaced('version = "', 'version = "1.'), "must be of three numbers"),
        (replaced('{ file = "LICENSE" }', '"GPL-3.0"'), "license must be { file = ... }"),
        (replaced('{ file = "LICENSE" }', '{ file = "LICENCE" }'), "license must be { file = ... }"),
        (replaced('PublisherId = "lorasmith"', ""), "PublisherId is missing"),
        (replaced('">=0.14.1"', '">=0.14"'), "requires-comfyui = '>=0.14' must"),
        (replaced("OS Independent", "BeOS"), "must name operating systems"),
        (replaced("Icon =", "Image ="), "Icon must be the address of icon.svg"),
        (replaced("Repository =", "Homepage ="), f"Repository must be {ADDRESS}"),
        (lambda folder: shutil.copy(folder / "banner.svg", folder / "icon.svg"), "icon.svg is of 1260×540"),
        (lambda folder: (folder / "nodes.py").write_text("eval('1')"), "nodes.py:1 calls eval"),
        (lambda folder: (folder / "nodes.py").write_text("from subprocess import run"), "imports subprocess: nodes"),
        (lambda folder: (folder / "nodes.so").write_text(""), "nodes.so is of a kind that nodes do not need"),
    ],
)
def test_what_breaks_a_rule_is_named(
    folder: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    write_pack(folder, tmp_path / "pack.zip", EPOCH)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_pack(tmp_path / "pack.zip", ADDRESS)


def test_installing_it_takes_no_package_of_comfyui_back() -> None:
    """ComfyUI pins its own packages; of others it has lower bounds, so that only an upper one would move them back."""
    project = tomllib.loads((release.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [re.fullmatch(r"([\w-]+)>=[\d.]+", one) for one in project["dependencies"]]
    assert all(needed) and not [one[1] for one in needed if one is not None and one[1].startswith("comfyui")]
