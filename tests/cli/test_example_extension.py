"""The example of an extension, installed: commands use its algorithm and its family, and name it when it is gone."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.extras import TINY
from lorasmith.data.data_config import ImageSource
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from tests.installed import EXAMPLE, PROJECT, forget_extensions, install, install_example

Command = Callable[..., Any]
GONE = "of the package lorasmith-example 0.1, which is not installed"
REMEDY = "if you trust it, run: pip install lorasmith-example"


def in_process(packages: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a Python does in whose path the example is installed."""
    path = os.pathsep.join([str(install_example(packages / "path")), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, a model and a run that used the installed example."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(TINY.folder / "input" / "fox", folder / "photos")
    model = folder / "models" / "checkpoints" / "sketch.safetensors"
    model.parent.mkdir(parents=True)
    settings = {"algorithm": "ia3", "steps": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sketch", str(model)])
        runpy.run_path(str(PROJECT / "src" / "lorasmith_example" / "sketch.py"), run_name="__main__")
        install(patch, tmp_path_factory.mktemp("packages"), EXAMPLE)
        source = ImageSource(str(folder / "photos"))
        spec = RunSpec(sources=(source,), model=str(model), output=str(folder / "run"), settings=settings)
        run(plan(spec, Host()), Host())
    forget_extensions()
    return folder


@pytest.fixture
def work(place: Path, lorasmith: Command, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, as the current one."""
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path / "packages", EXAMPLE)


LORA = "run/photos.safetensors"


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_commands_use_what_it_brings(work: Path, lorasmith: Command) -> None:
    inspected = lorasmith("inspect", LORA)
    assert inspected.code == 0 and "ia3 × 2" in inspected.out and "IA3 (lorasmith-example 0.1)" in inspected.out
    assert lorasmith("check", LORA, "--model", "models/checkpoints/sketch.safetensors").code == 0
    drawn = lorasmith("generate", "--model", "sketch.safetensors", "--lora", LORA, "--prompt", "a fox", "--steps", "1")
    assert drawn.code == 0, drawn.err
    resumed = lorasmith("resume", "run", "--steps", "5", "--json")
    assert resumed.code == 0, resumed.err
    assert "Sketch" in lorasmith("models", "--known").out
    assert "sketch.safetensors" in lorasmith("models", "--base-dir", work).out
    assert lorasmith("data", "check", "photos", "--model", "sketch.safetensors").code == 0
    assert lorasmith("reproduce", LORA).code == 0
    options = ("--algorithm", "IA3", "--alpha", "1", "--rank-dropout", "0.1", "--steps", "1")
    refused = lorasmith("train", "photos", "--model", "sketch.safetensors", *options)
    assert "rank_dropout is for LoRA, got algorithm IA3" in refused.err


def test_help_names_it_without_importing_it(tmp_path: Path) -> None:
    code = "import sys; from lorasmith.cli.main import main\ntry: main()\nfinally: print(*sys.modules, sep=', ')"
    done = in_process(tmp_path, "-c", code, "train", "--help-all")
    text, _, modules = " ".join(done.stdout.split()).rpartition("Append everything")
    assert "GLoRA, Full, IA3." in text and "lorasmith_example" not in modules and " torch," not in modules


def test_files_name_it_when_it_is_gone(work: Path, lorasmith: Command) -> None:
    inspected, checked = lorasmith("inspect", LORA), lorasmith("check", LORA)
    assert inspected.code == 0 and checked.code == 1
    for said in (inspected.out, checked.out):
        assert f"it needs the algorithm 'IA3' (and 1 more) {GONE}" in said
    assert REMEDY in checked.out and "sketch (lorasmith-example 0.1, missing)" in inspected.out
    for command in (
        ("generate", "--model", "lorasmith-tiny", "--lora", LORA, "--prompt", "a fox"),
        ("train", "photos", "--model", "lorasmith-tiny", "--existing-lora", LORA, "--steps", "1"),
        ("train", "photos", "--config", "run/run.json"),
        ("resume", "run", "--steps", "9"),
        ("reproduce", LORA),
    ):
        ran = lorasmith(*command)
        assert ran.code == 1 and "needs the algorithm 'IA3' (and" in ran.err and f"{GONE}; {REMEDY}" in ran.err, command
    unknown = lorasmith("train", "photos", "--model", "lorasmith-tiny", "--algorithm", "IA3")
    assert unknown.code == 1 and "algorithm must be one of LoRA, LoHa" in unknown.err


def test_a_private_file_names_it_too(work: Path, lorasmith: Command, installed: None) -> None:
    options = ("--algorithm", "IA3", "--steps", "1", "--private", "--output", "private")
    trained = lorasmith("train", "photos", "--model", "sketch.safetensors", *options)
    assert trained.code == 0 and "IA3, on transformer: 2 layers, 128 parameters" in trained.out
    assert "IA3 (lorasmith-example 0.1)" in lorasmith("inspect", "private/photos.safetensors").out


def test_the_doctor_lists_extensions_and_what_is_wrong_with_them(
    lorasmith: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = {
        "adapters": {"Gone": "no_such_module:Gone", "lora": "lorasmith_example.ia3:Ia3Adapter"},
        "adapter": {"X": "x:X"},
    }
    install(monkeypatch, tmp_path / "packages", {**EXAMPLE, "broken": broken})
    ran = lorasmith("doctor")
    assert ran.code == 1
    assert "lorasmith-example 0.1: IA3 (adapters), usable" in ran.out
    assert "broken 0.1: Gone (adapters), cannot be used" in ran.out
    for problem in (
        "the adapter algorithm 'Gone' of broken 0.1 cannot be used (ModuleNotFoundError: No module named "
        "'no_such_module'); update or uninstall that package",
        "adapter algorithm 'LoRA' is registered twice, by lorasmith and by broken 0.1; uninstall or rename one of them",
        "unknown kind of extension 'adapter' (did you mean 'adapters'?); use one of adapters, families",
    ):
        assert problem in ran.out
    listed = {one["name"]: one for one in json.loads(lorasmith("doctor", "--json").out)["extensions"]}
    assert listed["sketch"] == {
        "kind": "families", "name": "sketch", "package": "lorasmith-example", "version": "0.1", "fault": ""
    }  # fmt: skip
    refused = lorasmith("targets", "--model", "lorasmith-tiny", "--algorithm", "gone")
    assert refused.code == 1 and "the adapter algorithm 'Gone' of broken 0.1 cannot be used" in refused.err
    assert lorasmith("targets", "--model", "lorasmith-tiny").code == 0


def test_nodes_of_packages_are_listed(lorasmith: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nodes_of_a_package.py").write_text(
        "from lorasmith.workflow import node\n@node('OwnNode', 'Own', 'own')\ndef own(context):\n    return ()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    things = {"OwnNode": "nodes_of_a_package:own", "GoneNode": "no_such_module:own"}
    install(monkeypatch, tmp_path / "packages", {"own": {"nodes": things}})
    listed = lorasmith("nodes")
    assert listed.code == 0 and "OwnNode" in listed.out and "GoneNode" not in listed.out
    asked = lorasmith("nodes", "GoneNode")
    assert asked.code == 1 and "the node 'GoneNode' of own 0.1 cannot be used" in asked.err


def test_it_is_as_short_as_a_template_should_be() -> None:
    assert sum(len(file.read_text("utf-8").splitlines()) for file in (PROJECT / "src").rglob("*.py")) < 165


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "chosen"),
    [
        (("adapters/test_contract.py", "adapters/test_weights.py"), "IA3"),
        (("families/test_base.py", "core/test_registry.py"), "sketch or name"),
    ],
)
def test_the_tests_of_the_contracts_run_over_it(tmp_path: Path, tests: tuple[str, ...], chosen: str) -> None:
    root = Path(__file__).parents[2]
    files = (str(root / "tests" / name) for name in tests)
    command = ("-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-k", chosen)
    assert " passed" in in_process(tmp_path, *command, *files, cwd=root).stdout
