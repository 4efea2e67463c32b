from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.runs.recorded_run import Typed, read_run_file
from lorasmith.runs.spec import RunSpec
from lorasmith.training.config import TrainConfig

WHOLE = """
model = "model.safetensors"
low_noise_model = "low.safetensors"
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
    (tmp_path / "low.safetensors").touch()
    found = read_run_file(written(tmp_path, WHOLE))
    assert found.sources == (
        ImageSource(str(tmp_path / "photos"), repeats=2),
        ImageSource(str(tmp_path / "more" / "metadata.jsonl")),
        ImageSource("/elsewhere", weight=0.5),
    )
    assert found.model == str(tmp_path / "model.safetensors")
    assert found.low_noise_model == str(tmp_path / "low.safetensors")
    assert found.text_encoders == ("t5.safetensors",), "no such file: a hub id, or a name"
    spec = found.resolved()
    assert (spec.name, spec.sources) == ("dog", found.sources)
    assert spec.data == DataConfig(trigger="sks dog", flip=True, class_images=str(tmp_path / "dogs"))
    expected = TrainConfig(steps=800, learning_rate=1e-4, existing_lora=str(tmp_path / "before.safetensors"))
    assert found.trusted().config == expected


def test_what_is_typed_comes_first(tmp_path: Path) -> None:
    file = read_run_file(written(tmp_path, WHOLE))
    typed = RunSpec(sources=(ImageSource("other"),), device="cpu", settings={"steps": 3})
    both = typed.completed(file)
    assert (both.sources, both.device, both.name) == (typed.sources, "cpu", "dog")
    assert both.config.steps == 3
    assert both.data.trigger == "sks dog"


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
        ("optimizer = 'antigravity.X'", "optimizer in a file must be one of"),
        ("schedule = 'antigravity:X'", "schedule in a file must be one of"),
        ("loss_function = 'antigravity:X.y'", "loss_function in a file must be one of"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence) as refused:
        found = read_run_file(written(tmp_path, text)).trusted()
        assert found.data and found.config
    assert "\n" not in str(refused.value)


def test_code_and_trackers_are_typed(tmp_path: Path) -> None:
    file = read_run_file(written(tmp_path, "track = 'wandb'\noptimizer = 'torch.optim.NAdam'"))
    config = file.trusted(imports=["torch.optim.NAdam"]).config
    assert (config.optimizer, config.track) == ("torch.optim.NAdam", "none")
    assert file.trusted(imports=["torch.optim.NAdam"], track="wandb").config.track == "wandb"


def test_links_are_followed_if_that_is_typed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"may not have follow_links, .* type --follow-links"):
        read_run_file(written(tmp_path, "follow_links = true\n"))
    assert read_run_file(written(tmp_path, "follow_links = false\n")).settings["follow_links"] is False


def test_a_run_without_images() -> None:
    with pytest.raises(OptionError, match="a run needs images, got no folder of them"):
        RunSpec(model="m").resolved()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.toml cannot be read"):
        read_run_file(tmp_path / "nowhere.toml")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The record of a run on two folders, one in the current folder and one elsewhere."""
    (tmp_path / "here" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    spec = RunSpec(
        sources=(ImageSource("photos", repeats=2), ImageSource(str(tmp_path / "more"))),
        model="lorasmith-tiny",
        name="dog",
        device="cpu",
        settings={"trigger": "sks dog", "flip": True},
    ).resolved()
    return {
        "version": 1,
        "title": "dog",
        "source": spec.to_record(),
        "model": {"name": "a", "path": "/gone", "files": {"denoiser": "/gone"}},
        "config": {"steps": 800, "learning_rate": 3e-4},
        "asked": {"steps": 800, "learning_rate": None, "track": "wandb", "rank": 4},
        "adapters": {"a": 3},
        "fingerprint": {"config": {"training_dtype": "fp32"}},
    }


def recorded(record: object, **changes: Any) -> Path:
    path = Path("run.json")
    text = json.dumps({**record, **changes}) if isinstance(record, dict) else str(record)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_record_of_a_run_gives_its_arguments(record: dict[str, Any], tmp_path: Path) -> None:
    path = recorded(record)
    found = read_run_file(path, Typed(files=True))
    assert found.sources == (
        ImageSource(str(tmp_path / "here" / "photos"), repeats=2),
        ImageSource(str(tmp_path / "more")),
    )
    assert (found.model, found.name, found.device, found.output) == ("lorasmith-tiny", "dog", "cpu", None)
    assert found.resolved().to_record() == record["source"]
    assert found.trusted().config == TrainConfig(steps=800, rank=4), "what was open is open, and no tracker starts"
    typed = RunSpec(model="m", settings={"steps": 3, "trigger": "sks cat"})
    both = typed.completed(found)
    assert (both.model, both.trusted().config.steps, both.config.rank) == ("m", 3, 4)
    assert both.data.trigger == "sks cat"
    renamed = path.rename("settings.txt")
    assert read_run_file(renamed, Typed(files=True)) == found


def test_a_record_names_files_here_unless_others_are_typed(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"^run.json may name files in the current folder alone.*images {tmp_path}"):
        read_run_file(recorded(record))
    typed = RunSpec(sources=(ImageSource("photos"),))
    assert read_run_file(recorded(record), Typed(spec=typed)).name == "dog"
    elsewhere = {**record["source"], "model": "somebody/model"}
    changed = recorded(record, source=elsewhere, asked={"existing_lora": "/etc/a.safetensors"})
    with pytest.raises(OptionError, match=r"model somebody/model; existing_lora /etc/a\.safetensors"):
        read_run_file(changed, Typed(spec=typed))
    typed = RunSpec(sources=typed.sources, model="m", settings={"existing_lora": "mine.safetensors"})
    assert read_run_file(changed, Typed(spec=typed)).settings["existing_lora"] == "/etc/a.safetensors"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 2}, "version must be between 1 and 1, got 2; if a later Lorasmith wrote it, update"),
        ({"version": None}, "version must be an integer, got None"),
        ({"source": {"command": "run", "prompt": {}}}, "was not made by lorasmith train"),
        ({"source": {}}, "has no source of a run"),
        ({"source": {"command": "train", "folder": "/a", "name": "x"}}, "source.model is missing"),
        ({"source": {"command": "train", "folder": "/a", "name": "x", "model": 3}}, "source.model must be text"),
        ({"asked": {"stepz": 3}}, "has settings of another version of Lorasmith, stepz; train with that version"),
        ({"asked": {"steps": [3]}}, "asked.steps must be"),
        ({"asked": 3}, "asked must be an object, got 3"),
        ("{", "is not valid JSON"),
        ('{"source": NaN}', "has a number that is not finite"),
        ("[" * 10_000, "deeper than"),
        ('{"nodes": [], "links": []}', "has no source of a run"),
        ("3", "it must be an object, got 3"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_in_a_sentence(
    record: dict[str, Any], changes: dict[str, Any] | str, sentence: str
) -> None:
    path = recorded(changes) if isinstance(changes, str) else recorded(record, **changes)
    with pytest.raises(OptionError, match=sentence) as refused:
        read_run_file(path, Typed(files=True))
    assert str(refused.value).startswith("run.json ") and "\n" not in str(refused.value)


def test_a_setting_of_data_from_another_version(record: dict[str, Any]) -> None:
    path = recorded(record, source={**record["source"], "fold": True})
    with pytest.raises(OptionError, match="has settings of another version of Lorasmith, fold"):
        read_run_file(path, Typed(files=True))


def test_a_record_of_before_versions(record: dict[str, Any], tmp_path: Path) -> None:
    del record["version"]
    old = {"command": "train", "folder": str(tmp_path / "here" / "photos"), "model": "lorasmith-tiny", "name": "dog"}
    found = read_run_file(recorded(record, source=old))
    assert found.sources == (ImageSource(old["folder"]),)
