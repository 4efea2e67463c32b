"""`lorasmith` alone: what needs no package of a model family works, and the rest says in a sentence what to install."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorasmith.core.extras import EDITOR, TINY, Companion
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.families.locating import BUILT_IN, built_in_models
from tests.bare_process import ONLY_WITH_MODELS
from tests.launched import environment, needs_editor

ROOT = Path(__file__).parents[1]
LAYERS = [f"lora_unet_double_blocks_{block}_img_attn_proj" for block in (0, 1)]
LORA = "{}/a.safetensors"

WORKS = {
    "help": ["--help"],
    "nodes": ["nodes"],
    "inspect": ["inspect", LORA],
    "check": ["check", LORA],
    "merge": ["merge", f"{LORA}:0.8", "{}/b.safetensors:0.5", "--output", "{}/merged.safetensors"],
    "resize": ["resize", LORA, "--rank", "1", "--output", "{}/resized.safetensors"],
    "diff": ["diff", LORA, LORA],
    "doctor": ["doctor", "--base-dir", "{}"],
    "examples": ["run", "example:"],
    "models": ["models", "--base-dir", "{}/base"],
    "data": ["data", "check", "{}/photos"],
}
TINY_MISSING = "lorasmith-tiny is not installed; run pip install ./lorasmith-tiny in a copy of the repository"
MODELS = 'run pip install "lorasmith[models]"'
DIFFUSERS = f"needs the package diffusers, which is not installed; {MODELS}"
HUB = f"a model of a hub needs the package huggingface_hub, which is not installed; {MODELS}"
CAPTIONER = f"a captioner of transformers needs the package transformers, which is not installed; {MODELS}"
SD15 = ["--model", "{}/base/models/checkpoints/sd15.safetensors"]
REFUSED = {
    "family": (["targets", *SD15], f"Stable Diffusion 1.x {DIFFUSERS}"),
    "training": (["train", "{}/photos", *SD15, "--output", "{}/run"], f"Stable Diffusion 1.x {DIFFUSERS}"),
    "known": (["models", "--known"], DIFFUSERS),
    "layout": (["convert", LORA, "--to", "diffusers", "--output", "{}/c.safetensors"], f"Flux.1 {DIFFUSERS}"),
    "hub": (["targets", "--model", "owner/name"], HUB),
    "caption": (["data", "caption", "{}/photos", "--overwrite", "--with", "{}/photos"], CAPTIONER),
    "demo": (["demo", "--output", "{}/demo"], f"error: {TINY_MISSING}"),
    "built-in model": (["targets", "--model", "lorasmith-tiny"], TINY_MISSING),
    "example": (["run", "example:style", "--base-dir", "{}"], TINY_MISSING),
    "pictures": (["run", "example:sd15", "--base-dir", "{}"], TINY_MISSING),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without the optional packages printed."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("a", "b"):
        tensors = {}
        for layer in LAYERS:
            tensors |= {
                f"{layer}.lora_down.weight": torch.randn(2, 3072),
                f"{layer}.lora_up.weight": torch.randn(3072, 2),
            }
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
        save_file(tensors, folder / f"{name}.safetensors")
    checkpoints = folder / "base" / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(built_in_models()[BUILT_IN], checkpoints / "sd15.safetensors")
    (folder / "photos").mkdir()
    (folder / "photos" / "fox_1.txt").write_text("drawings")
    shutil.copy(BUILT_IN_BASE / "input" / "fox" / "fox_1.png", folder / "photos")
    commands = [*WORKS.values(), *(command for command, _ in REFUSED.values())]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bare_process", str(folder), json.dumps(commands)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "ran": dict(zip((*WORKS, *REFUSED), found["ran"], strict=True))}


def test_every_module_is_imported_but_those_of_networks(bare: Mapping[str, Any]) -> None:
    files = [one.relative_to(ROOT / "src").with_suffix("") for one in (ROOT / "src" / "lorasmith").rglob("*.py")]
    modules = {".".join(one.parts).removesuffix(".__init__") for one in files} - {"lorasmith", "lorasmith.__main__"}
    assert modules - set(bare["modules"]) == set(ONLY_WITH_MODELS)


def test_tools_and_lists_work(bare: Mapping[str, Any]) -> None:
    for name in WORKS:
        code, text = bare["ran"][name]
        assert code == 0, text


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_more_says_what_to_install(bare: Mapping[str, Any], name: str) -> None:
    code, text = bare["ran"][name]
    assert code == 1 and "error: " in text and REFUSED[name][1] in text, text


def test_the_page_says_what_to_install(bare: Mapping[str, Any]) -> None:
    assert bare["listed"] == ["sd15.safetensors"] and bare["datasets"] == 0 and not bare["editor"]
    tiny, models = bare["notes"]
    assert tiny.startswith(TINY_MISSING)
    assert models == f"the packages for models are not installed (diffusers, transformers, sentencepiece); {MODELS}"


@pytest.mark.parametrize("version", ["0.8.1", "0.10.0", "1.0.0"])
def test_a_companion_of_another_release_is_not_used(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    required = ['lorasmith-tiny~=0.9.0; extra == "demo"']
    monkeypatch.setattr("lorasmith.core.extras.metadata.requires", lambda name: required)
    monkeypatch.setattr("lorasmith.core.extras.metadata.version", lambda name: version)
    found = Companion.find("lorasmith-tiny", "demo")
    assert not found.folder.exists() and found.version == version
    assert found.trouble == (
        f"lorasmith-tiny {version} does not fit, as this lorasmith needs 0.9.x; run pip install ./lorasmith-tiny in a "
        'copy of the repository of this version, or pip install "lorasmith[demo]"'
    )
    monkeypatch.setattr("lorasmith.core.extras.metadata.version", lambda name: "0.9.7")
    assert not Companion.find("lorasmith-tiny", "demo").trouble


@pytest.mark.parametrize("companion", [TINY, pytest.param(EDITOR, marks=needs_editor)], ids=lambda one: one.name)
def test_companions_fit(companion: Companion) -> None:
    assert companion.folder.is_dir() and not companion.trouble
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = [one for packages in project["optional-dependencies"].values() for one in packages]
    assert f"{companion.name}~={project['version']}" in named


def test_the_normal_install_needs_no_package_of_models() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = {re.split("[<>=]", one)[0] for one in project["dependencies"]}
    assert "torch" in names and not names & {"diffusers", "transformers", "accelerate", "sentencepiece"}


def test_what_others_made_is_named_with_its_licence() -> None:
    """Apache-2.0 is true of the wheel: what is in it besides is named in NOTICE, and comes with its licence."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    package, notice = ROOT / "src" / "lorasmith", (ROOT / "NOTICE").read_text("utf-8")
    ours = {".py", ".mjs", ".css", ".html", ".svg", ".json", ".typed", ".md", ".pyc"}
    others = {one for one in package.rglob("*.*") if one.is_file() and one.suffix not in ours}
    others |= {*package.glob("server/pages/vendor/*")}
    for path in (one.relative_to(ROOT) for one in others):
        assert path.as_posix() in notice or path.parent.as_posix() in notice
    licences = {*ROOT.glob("src/**/*LICENSE*")}
    assert licences == {path for pattern in project["license-files"] for path in ROOT.glob(pattern)} & others
    assert not any("GENERAL PUBLIC LICENSE" in path.read_text("utf-8") for path in licences)
