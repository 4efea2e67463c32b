"""Folders of transformers run no code, ask nothing, and read nothing elsewhere, whatever their configurations name."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import ModelError
from lorasmith.core.pretrained import NETWORKS, import_by_modules, load_pretrained
from lorasmith.data.captioners import transformers_captioner
from lorasmith.evaluation.clip_model import ClipModel
from lorasmith.families.parts.encoders import folder_tokenizer
from tests.data.caption_models import MODELS
from tests.small_clip import small_clip

SOURCE = Path(__file__).parents[2] / "src"
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked at the terminal, all of it answered with yes."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "y")
    return questions


def write(folder: Path, name: str, values: Any, *, into: bool = True) -> None:
    path = folder / name
    before = json.loads(path.read_text()) if into and path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


def other_folder(folder: Path) -> Path:
    """Beside a folder, one whose code leaves a mark when it runs."""
    other = folder.with_name(f"{folder.name}-other")
    other.mkdir()
    (other / "evil.py").write_text(EVIL)
    maps = {f"Auto{name}": "evil.Evil" for name in ("Config", "Model", "Processor", "ImageProcessor")}
    write(other, "config.json", {"model_type": "evil", "auto_map": maps})
    return other


def audio_tokenizer(folder: Path) -> None:
    place = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(other_folder(folder))}
    write(folder, "processor_config.json", {"audio_tokenizer": place})


def audio_tokenizer_in_a_file(folder: Path) -> None:
    place = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(other_folder(folder))}
    write(folder, "audio_tokenizer_config.json", place)


def relative_audio_tokenizer(folder: Path) -> None:
    place = os.path.relpath(other_folder(folder))
    named = {"audio_tokenizer_class": "AutoConfig", "audio_tokenizer_name_or_path": place}
    write(folder, "processor_config.json", {"audio_tokenizer": named})


def nested_code(folder: Path) -> None:
    (folder / "evil.py").write_text(EVIL)
    write(folder, "config.json", {"x_config": {"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}}})


def code_in_a_list(folder: Path) -> None:
    write(folder, "preprocessor_config.json", {"parts": [[{"auto_map": {"AutoImageProcessor": "evil.Evil"}}]]})


def code_in_another_version(folder: Path) -> None:
    nested_code(folder)
    (folder / "config.json").rename(folder / "Config.0.1.json")
    write(folder, "config.json", {"configuration_files": ["Config.0.1.json"]})


def a_backbone(folder: Path) -> None:
    write(folder, "config.json", {"vision_config": {"backbone": "somebody/else", "use_pretrained_backbone": True}})


def a_vocabulary_elsewhere(folder: Path) -> None:
    secret = folder.with_name("secret.txt")
    secret.write_text("secret")
    write(folder, "tokenizer_config.json", {"vocab_file": str(secret)})


def an_adapter(folder: Path) -> None:
    write(folder, "adapter_config.json", {"base_model_name_or_path": str(other_folder(folder))})


def two_meanings(folder: Path) -> None:
    text = json.dumps(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(f'{{"model_type": "evil", {text[1:]}')


HOSTILE = [audio_tokenizer, audio_tokenizer_in_a_file, relative_audio_tokenizer, nested_code, code_in_a_list,
           code_in_another_version, a_backbone, a_vocabulary_elsewhere, an_adapter, two_meanings]  # fmt: skip
SAID = r"names code in a nested|names another model|names a file of another|is an adapter|has a name twice"


@pytest.mark.parametrize("damage", HOSTILE)
@pytest.mark.parametrize("door", ["captioner", "CLIP", "tokenizer"])
def test_what_a_configuration_names_is_refused_before_anything_is_loaded(
    tmp_path: Path, asked: list[str], damage: Callable[[Path], None], door: str, models: dict[str, Path]
) -> None:
    folder = copied(models["CLIP" if door == "CLIP" else "git"], tmp_path / "copy")
    damage(folder)
    doors: dict[str, Callable[[], object]] = {
        "captioner": lambda: transformers_captioner(str(folder), torch.device("cpu")),
        "CLIP": lambda: ClipModel(folder),
        "tokenizer": lambda: folder_tokenizer(folder),
    }
    with pytest.raises(ModelError, match=SAID) as refused:
        doors[door]()
    assert "\n" not in str(refused.value)
    assert not asked and "evil" not in sys.modules and not [*tmp_path.rglob("ran")]


def test_the_question_is_impossible_in_the_whole_process(tmp_path: Path, asked: list[str]) -> None:
    """Also for a load that is not ours and has no flag, once one of ours was made; an explicit flag still counts."""
    from transformers import AutoConfig

    with pytest.raises(ModelError):
        folder_tokenizer(tmp_path)
    folder = other_folder(tmp_path / "model")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        AutoConfig.from_pretrained(folder)
    assert not asked and not [*folder.rglob("ran")]


def test_a_module_of_a_package_is_imported_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the package is asked for one of its names."""
    folder = tmp_path / "of_networks" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text("from .large import Large\nfrom .small import Small\n")
    for name in ("large", "small"):
        (folder / f"{name}.py").write_text(f"class {name.title()}: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_by_modules("of_networks.inner")
    small = importlib.import_module("of_networks.inner.small")
    assert "of_networks.inner.large" not in sys.modules
    package = importlib.import_module("of_networks").inner
    assert not hasattr(package, "__wrapped__") and "of_networks.inner.large" not in sys.modules
    assert package.Large.__module__ == "of_networks.inner.large" and package.Small is small.Small
    with pytest.raises(AttributeError, match="Medium"):
        package.Medium  # noqa: B018
    import_by_modules("of_networks.inner")
    assert sys.modules["of_networks.inner"] is package


@pytest.mark.parametrize("package", NETWORKS)
def test_packages_that_are_imported_by_modules_only_pass_names_on(package: str) -> None:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    todo: list[ast.stmt] = ast.parse(Path(spec.origin).read_bytes()).body
    assert todo
    for one in todo:
        inner = one.body if isinstance(one, ast.If) else [one]
        assert all(isinstance(each, ast.Import | ast.ImportFrom) for each in inner), ast.unparse(one)


def test_a_folder_of_ones_own_with_paths_that_are_gone_is_loaded(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(models["git"], tmp_path / "copy")
    gone = {"tokenizer_file": "/nowhere/tokenizer.json", "special_tokens_map_file": "/etc/hostname"}
    write(folder, "tokenizer_config.json", {**gone, "name_or_path": "/etc"})
    write(folder, "config.json", {"_name_or_path": "somebody/else"})
    assert folder_tokenizer(folder)("a cat")["input_ids"]


def test_one_function_loads_what_transformers_saved() -> None:
    """Every `from_pretrained` of the source, read or called."""
    places = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    }
    assert places == {"lorasmith/core/pretrained.py"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    MODELS["git"](folder / "git")
    return {"git": folder / "git", "CLIP": small_clip(folder / "clip")}


def copied(folder: Path, place: Path) -> Path:
    """A copy whose weights are links."""
    place.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            (place / path.name).symlink_to(path.resolve())
        else:
            (place / path.name).write_bytes(path.read_bytes())
    return place


def test_arguments_are_passed_on(models: dict[str, Path]) -> None:
    seen: dict[str, Any] = {}

    class Kind:
        @staticmethod
        def from_pretrained(folder: Path, **settings: Any) -> Path:
            seen.update(settings)
            return folder

    assert load_pretrained(Kind, models["git"], use_safetensors=True) == models["git"]
    assert seen == {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
