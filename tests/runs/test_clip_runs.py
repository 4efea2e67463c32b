"""Runs on folders of clips and pictures, with a small model of clips."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clips import clip_model

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.data_config import ImageSource
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN, ModelFiles
from lorasmith.families.model import Model
from lorasmith.families.model_search import Completed
from lorasmith.formats.container import read_safetensors
from lorasmith.runs.library import load_dataset
from lorasmith.runs.plan import FolderPlan, plan
from lorasmith.runs.run import Host, run
from lorasmith.runs.run_plan import ImagesFound, ModelLoading
from lorasmith.runs.spec import RunSpec
from tests.data.video_cases import animation, movie
from tests.hosts import Audience
from tests.runs.folder_cases import placed


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


class Loaded(Audience):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model

    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        return Completed(self._model, files)


def ready(
    model: Model, images: Path, output: Path | None = None, *, host: Loaded | None = None, **settings: Any
) -> FolderPlan:
    given = {"rank": 2, "targets": "attention", "steps": 4, "previews": "", **settings}
    spec = RunSpec(sources=(ImageSource(str(images)),), model="clips", name="cat", settings=given)
    return plan(placed(spec, output), host or Loaded(model))


@pytest.mark.slow
def test_clips_and_pictures_are_trained_together(model: Model, folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "validation_share": 0.25, "validate_every": 2}
    whole_run = ready(model, folder, tmp_path / "whole", **settings)
    shapes = [tuple(one.latents.shape[1:]) for one in whole_run.data.samples]
    assert shapes == [(2, 4, 4), (1, 4, 4), (1, 4, 4), (2, 4, 4)]
    assert run(whole_run, Host()).steps == 4
    assert all(bool(one.any()) for one in read_safetensors(tmp_path / "whole" / "cat.safetensors")[0].values())


def test_a_model_of_pictures_leaves_videos_out_and_says_so(folder: Path) -> None:
    tiny = load_model(BUILT_IN)
    host = Loaded(tiny)
    planned = ready(tiny, folder, host=host, resolution=32)
    assert [one.latents.ndim for one in planned.data.samples] == [3, 3, 3]
    kinds = [type(one) for one in host.events]
    assert kinds.index(ModelLoading) < kinds.index(ImagesFound), "which decides whether videos are read"
    ((path, reason),) = planned.summary.scan.skipped
    assert path.name == "4.mp4" and "models of pictures are not trained" in reason
    with pytest.raises(OptionError, match=r"frames is for models of videos, got 33"):
        ready(tiny, folder, frames=33)


@pytest.mark.slow
def test_previews_are_animations_in_folder_sheet_and_report(model: Model, folder: Path, tmp_path: Path) -> None:
    previews = {"previews": "a wave|a calm", "preview_steps": 1, "preview_frames": 7, "preview_strengths": "1"}
    result = run(ready(model, folder, tmp_path / "run", steps=2, **previews), Host())
    samples = tmp_path / "run" / "samples"
    names = sorted(path.name for path in samples.iterdir())
    assert {"base-1.webp", "base-2.webp", "step-000002-1.webp", "strength-1-2.webp", "steps.png"} <= set(names)
    with Image.open(samples / "step-000002-1.webp") as shown:
        assert shown.n_frames == 5  # type: ignore[attr-defined]
    with Image.open(samples / "steps.png") as sheet:
        assert sheet.height > 2 * 128  # the base model's row, and that of the step
    assert result.path is not None
    with Image.open(result.path.with_suffix(".png")) as picture:
        assert picture.format == "PNG"
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    uris = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page)
    frames = [Image.open(io.BytesIO(base64.b64decode(uri))).n_frames for uri in uris]  # type: ignore[attr-defined]
    assert frames.count(5) == 4 + 6  # base model and LoRA of two prompts, and over two steps


def test_frames_in_memory_are_a_clip(model: Model, folder: Path) -> None:
    with Image.open(folder / "1.webp") as film:
        frames = []
        for index in range(9):
            film.seek(index)
            frames.append(np.array(film.convert("RGB")))
    items = [
        {"video": np.stack(frames), "text": "a wave", "frame_rate": 5},
        (torch.from_numpy(frames[0]).permute(2, 0, 1), "a photo"),
        (np.stack(frames), "at the model's rate"),
    ]
    for name in ("2.webp", "3.webp", "4.mp4"):
        (folder / name).unlink()
    (file,) = load_dataset(folder, model, progress=False)
    clip, photo, other = load_dataset(items, model, progress=False)
    assert torch.equal(clip.latents, file.latents) and torch.equal(other.latents, file.latents)
    assert photo.latents.shape[1] == 1 < clip.latents.shape[1]
