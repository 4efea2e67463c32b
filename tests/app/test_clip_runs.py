"""Runs on folders of clips and pictures, with a small model of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clips import clip_model

from lorasmith.app.folder_run import PreparedRun, prepare, train_prepared
from lorasmith.app.folder_source import FolderSource
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.families.model_search import Completed
from lorasmith.formats.container import read_safetensors
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Warned
from tests.data.test_clips import animation
from tests.data.video_cases import movie


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return clip_model(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two animations of different length, a video and a photo."""
    images = tmp_path / "images"
    animation(images / "1.webp", 9, milliseconds=200, size=(48, 48)).with_suffix(".txt").write_text("a wave")
    animation(images / "2.webp", 3, milliseconds=200, size=(48, 48))
    animation(images / "3.webp", 1, size=(48, 48))
    movie(images / "4.mp4", 12, width=48, height=48)
    return images


def ready(model: Model, images: Path, events: list[Event] | None = None, **settings: Any) -> PreparedRun:
    data = {name: settings.pop(name) for name in options_of(DataConfig) if name in settings}
    config = TrainConfig(**{"rank": 2, "targets": "attention", "steps": 4, "previews": "", **settings})
    source = FolderSource.of(images, "clips", name="cat", data=DataConfig(**data))
    heard = events if events is not None else []
    return prepare(source, config, load=lambda files, _: Completed(model, files), on_event=heard.append)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(folder / "cat.safetensors")[0]


@pytest.mark.slow
def test_clips_and_pictures_are_trained_together_and_resumed_to_the_bit(
    model: Model, folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "validation_share": 0.25, "validate_every": 2}
    run = ready(model, folder, **settings)
    shapes = [tuple(one.latents.shape[1:]) for one in run.data.samples]
    assert shapes == [(2, 4, 4), (1, 4, 4), (1, 4, 4), (2, 4, 4)]
    result = train_prepared(run, output=tmp_path / "whole")
    assert result.steps == 4
    train_prepared(ready(model, folder, **settings), output=tmp_path / "two", until=2)
    train_prepared(ready(model, folder, **settings), output=tmp_path / "two")
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "two")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sum(bool(one.any()) for one in whole.values()) == len(whole)


@pytest.mark.slow
def test_settings_choose_frames_and_rate(model: Model, folder: Path) -> None:
    run = ready(model, folder, frames=9, frame_rate=10)
    assert [one.latents.shape[1] for one in run.data.samples] == [3, 2, 1, 3]
    assert any("clips are trained in part" in note for note in run.data.notes)
    assert ready(model, folder, frames=1).data.samples[0].latents.shape[1] == 1


def test_a_model_of_pictures_leaves_videos_out_and_says_so(folder: Path) -> None:
    events: list[Event] = []
    tiny = load_model(BUILT_IN)
    run = ready(tiny, folder, events, resolution=32)
    assert [one.latents.ndim for one in run.data.samples] == [3, 3, 3]
    (said,) = [one.message for one in events if isinstance(one, Warned)]
    assert said.startswith("1 video left out, such as 4.mp4: Stable Diffusion 1.x is trained on pictures")
    assert [path.name for path, _ in run.plan.scan.skipped] == ["4.mp4"]
    with pytest.raises(OptionError, match=r"frames is for models of videos, got 33"):
        ready(tiny, folder, frames=33)
