from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasmith.app.run_file import RunFile, read_run_file
from lorasmith.core.errors import OptionError
from lorasmith.data.data_config import DataConfig
from lorasmith.data.sources import ImageSource
from lorasmith.training.config import TrainConfig

WHOLE = """
model = "model.safetensors"
text_encoders = "t5.safetensors"
name = "dog"
trigger = "sks dog"
flip = true
class_images = "dogs"
steps = 800
learning_rate = 1e-4
existing_lora = "before.safetensors"

[[sources]]
path = "photos"
repeats = 2

[[sources]]
path = "more/metadata.jsonl"

[[sources]]
path = "/elsewhere"
weight = 0.5
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_a_file_gives_sources_and_settings_with_paths_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    found = read_run_file(written(tmp_path, WHOLE))
    assert found.sources == (
        ImageSource(str(tmp_path / "photos"), repeats=2),
        ImageSource(str(tmp_path / "more" / "metadata.jsonl")),
        ImageSource("/elsewhere", weight=0.5),
    )
    assert found.model == str(tmp_path / "model.safetensors")
    assert found.text_encoders == ("t5.safetensors",), "no such file: a hub id, or a name"
    source = found.source(found.model)
    assert (source.name, source.sources) == ("dog", found.sources)
    assert source.data == DataConfig(trigger="sks dog", flip=True, class_images=str(tmp_path / "dogs"))
    expected = TrainConfig(steps=800, learning_rate=1e-4, existing_lora=str(tmp_path / "before.safetensors"))
    assert found.train_config({}) == expected


def test_what_is_typed_comes_first(tmp_path: Path) -> None:
    file = read_run_file(written(tmp_path, WHOLE))
    typed = RunFile(sources=(ImageSource("other"),), device="cpu", settings={"steps": 3})
    both = typed.completed(file)
    assert (both.sources, both.device, both.name) == (typed.sources, "cpu", "dog")
    assert both.train_config(typed.settings).steps == 3
    assert both.source("m").data.trigger == "sks dog"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz = 3", "has an unknown key 'stepz'.*steps"),
        ("steps = 'many'", "steps must be an integer, got 'many'"),
        ("steps = 0", "steps must be between 1 and 100000"),
        ("flip = 3", "flip must be a true or false value"),
        ("model = ['a', 'b']", "model must be text"),
        ("sources = [{repeats = 2}]", r"sources\[0\].path is missing"),
        ("sources = [{path = 'a', repeats = 0}]", "repeats must be between 1 and 10000, got 0"),
        ("steps: 500", "must be TOML, such as steps = 500, but .*line 1"),
        ("steps = [", "must be TOML"),
        ("steps = " + 10_000 * "[", "must be TOML"),
        ("when = 2026-01-01", "has an unknown key 'when'"),
        ("optimizer = 'antigravity.X'", "an optimizer that a file names must be one of"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence) as refused:
        found = RunFile(sources=(ImageSource("a"),)).completed(read_run_file(written(tmp_path, text)))
        found.source("m")
        found.train_config({})
    assert "\n" not in str(refused.value)


def test_code_and_trackers_are_typed(tmp_path: Path) -> None:
    file = read_run_file(written(tmp_path, "track = 'wandb'\noptimizer = 'torch.optim.NAdam'"))
    typed: dict[str, Any] = {"optimizer": "torch.optim.NAdam"}
    config = file.train_config(typed)
    assert (config.optimizer, config.track) == ("torch.optim.NAdam", "none")
    assert file.train_config({**typed, "track": "wandb"}).track == "wandb"


def test_a_run_without_images() -> None:
    with pytest.raises(OptionError, match="a run needs images, got no folder of them"):
        RunFile().source("m")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.toml cannot be read"):
        read_run_file(tmp_path / "nowhere.toml")
