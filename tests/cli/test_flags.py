"""Flags of options, and the way back: what to type for a configuration."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lorasmith.cli import train as train_command
from lorasmith.cli.flags import folders_of
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.runs import plan as planning
from lorasmith.runs.spec import RunSpec
from lorasmith.training.config import TrainConfig

OPTIONS = {**options_of(TrainConfig), **options_of(DataConfig)}
NEEDED: dict[str, dict[str, Any]] = {
    "mask_folder": {"masks": "files"}, "bucket_max": {"bucket_min": 1}, "crop": {},
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "algorithm": "LoKr", "differences": "norms", "zero_init": "down", "dora": "input", "optimizer": "Adam",
    "schedule": "cosine", "loss_function": "L1", "objective": "x0", "timesteps": "uniform", "lora_dtype": "fp32",
    "tlora": "plain", "init": "LoRA-GA", "method": "keeping.methods:Blank", "method_args": "text='a dog' weight=0.5",
    "loss_weighting": "min_snr", "quantization": "int8", "products": "int8", "activations": "lean",
    "training_dtype": "none", "track": "wandb", "attention": "cudnn", "vae_dtype": "bf16",
    "trigger": "sks dog", "captions": "filename", "prefix": "a photo of", "suffix": "--", "more_resolutions": "256,512",
    "crop": "random", "masks": "alpha", "mask_folder": "/masks", "class_prompt": "a dog|a cat", "class_images": "/dogs",
    "control": ("/before", "/depth"), "controls": "optional",
    "early_stop": "likeness", "image_repeats": "a.png=0.5 | -b*=0",
    "preserve": "blank", "preserve_class": "dog", "prior_target": "model", "huber_schedule": "snr", "pairs": "slider",
    "guidance_loss": "2-4",
    "guidance_loss_schedule": "sigma", "slider_positive": "a|b", "slider_negative": "-c", "slider_neutral": "d",
    "new_word": "<ohwx>", "new_word_start": "-a dog",
    "slider_anchors": "e|f", "previews": "-a fox |\nb", "targets": "",
    "existing_lora": "gone.safetensors", "existing_state": "/states/1.safetensors",
    "training_adapter": "absent.safetensors", "optimizer_args": "betas=(0.9, 0.99)", "preview_strengths": "",
}  # fmt: skip


def test_a_base_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--base-dir must be a folder, but .*nope does not exist; correct the path"):
        folders_of(tmp_path / "nope", None)
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="file is not a folder"):
        folders_of(tmp_path / "file", None)
    assert folders_of(None, None).base == Path.cwd()


def values(name: str) -> list[Any]:
    """Some that are not the default, falsy ones above all."""
    one = OPTIONS[name]
    if one.type is bool:
        return [value for value in (True, False) if value is not one.default]
    if one.type is str:
        return [OTHERS[name]]
    return [value for value in {one.type(one.min), one.type(min(one.max, 1e6))} if value != one.default]


def spec_of(folder: Path, settings: dict[str, Any]) -> RunSpec:
    return RunSpec(sources=(ImageSource(str(folder)),), model="lorasmith-tiny", settings=settings).resolved()


def groups(folder: Path) -> list[dict[str, Any]]:
    """Every value of every option, together with as many others as a run may have."""
    found: list[dict[str, Any]] = []
    for name in OPTIONS:
        for value in values(name):
            for group in [*(one for one in found if name not in one), {}]:
                settings = {**group, name: value, **NEEDED.get(name, {})}
                with contextlib.suppress(OptionError):
                    assert spec_of(folder, settings).config.steps
                    found = [*(one for one in found if one is not group), settings]
                    break
            else:
                pytest.fail(f"{name} {value!r} is refused alone")
    return found


def test_what_a_run_says_to_type_gives_its_configuration_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, seen = typer.Typer(), list[RunSpec]()
    train_command.register(app)
    app.callback()(lambda: None)

    def listen(spec: RunSpec, host: object) -> None:
        seen.append(spec)
        raise typer.Exit

    monkeypatch.setattr(planning, "plan", listen)
    all_groups = groups(tmp_path)
    assert {name for group in all_groups for name in group} == OPTIONS.keys()
    for settings in all_groups:
        spec = spec_of(tmp_path, settings)
        ran = CliRunner().invoke(app, spec.command()[1:])
        assert ran.exit_code == 0, ran.output
        assert (seen[-1].data, seen[-1].config) == (spec.data, spec.config)
