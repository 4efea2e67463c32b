from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import ModelError, OptionError
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.runs import run_previews as previewing
from lorasmith.runs.library import train
from lorasmith.runs.preview_budget import whole_program
from lorasmith.runs.run import Host
from lorasmith.runs.run_previews import PreviewFrames, RunPreviews, previews_of
from lorasmith.sampling.previews import Previewer
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, LikenessMeasured, Previewed, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.train import Plan

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def saved(tiny: Model, captions: list[Conditioning], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file as training writes it."""
    data = EncodedDataset((Sample(torch.randn(4, 8, 8), captions[0], "1.png"),))
    settings = {"steps": 2, "rank": 2, "targets": "*.attn2.to_q", "learning_rate": 0.05, "training_dtype": "fp32"}
    result = train(tiny, data, output=tmp_path_factory.mktemp("run") / "run", title="pets", **settings)
    assert result.path is not None
    return result.path


def made(model: Model, config: TrainConfig, folder: Path, host: Host | None = None) -> RunPreviews:
    job = plan_job(model.denoiser, replace(config, rank=2, targets="attention"), "cpu")
    sample = Sample(torch.zeros(4, 8, 8), Conditioning({}), "1.png")
    plan = Plan(denoiser=model.denoiser, job=job, data=EncodedDataset((sample,)), title="pets")
    return previews_of(plan, whole_program(config), folder, host or Host())


class Stopped(Host):
    def cancelled(self) -> bool:
        return True


@pytest.fixture
def previews(tiny: Model, tmp_path: Path) -> Callable[..., RunPreviews]:
    def make(**settings: Any) -> RunPreviews:
        config = TrainConfig(**({"previews": "a lion | a bus", "preview_steps": 2, "seed": 9} | settings))
        return made(tiny, config, tmp_path)

    return make


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], None]:
    """Makes each drawing raise an error, or none."""
    draw = Previewer._drawn

    def set_to(error: BaseException | None) -> None:
        def fail(*_: object) -> list[Image.Image]:
            assert error is not None
            raise error

        monkeypatch.setattr(Previewer, "_drawn", draw if error is None else fail)

    return set_to


def rows(events: list[Event]) -> list[tuple[int, float]]:
    assert all(isinstance(event, Previewed) for event in events), events
    return [(event.step, event.strength) for event in events if isinstance(event, Previewed)]


def warning(events: Iterable[Event]) -> str:
    (event,) = events
    assert isinstance(event, Warned)
    return event.message


def test_the_second_failure_in_a_row_is_the_last(previews: Make, broken: Make, saved: Path) -> None:
    draw = previews()
    broken(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "could not be drawn (out of memory); training continues" in warning(draw(10, saved))
    assert warning(draw(20, saved)).endswith("nor could the one before; training continues without previews")
    broken(None)
    assert [*draw(30, saved), *draw(40, saved, final=True)] == []


def test_what_went_well_before_a_failure_is_told(previews: Make, saved: Path, tmp_path: Path) -> None:
    *drawn, failed = previews()(10, tmp_path / "absent.safetensors")
    assert rows(drawn) == [(10, 0.0)]
    assert "absent.safetensors" in warning([failed]) and "LoraError" not in warning([failed])


def test_a_picture_is_reported_before_it_is_measured(
    previews: Make, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading what measures takes longer than drawing, and a picture is waited for."""
    calls: list[str] = []

    class Measuring:
        def __init__(self, *_: object) -> None:
            calls.append("loaded")

        def measured(self, step: int, *_: object) -> LikenessMeasured:
            calls.append("measured")
            return LikenessMeasured(step=step, likeness=0.5, own=0.6, adherence=None, score=0.4)

    monkeypatch.setattr(previewing, "PreviewLikeness", Measuring)
    monkeypatch.setattr(previewing.likeness, "is_installed", lambda: True)
    draw = previews()
    events = [*draw.draw_base(0)]
    for event in draw(10, saved):
        assert isinstance(event, LikenessMeasured) or not calls
        events.append(event)
    assert calls == ["loaded", "measured"]
    assert rows(events[:-1]) == [(0, 0.0), (10, 1.0)] and isinstance(events[-1], LikenessMeasured)


def test_a_full_disk_is_a_warning(previews: Make, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").touch()
    assert "must be a folder but is a file" in warning(previews()(10, saved))


def test_interrupts_go_through(previews: Make, broken: Make, saved: Path) -> None:
    broken(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        list(previews()(10, saved))


def test_a_cancelled_preview_is_no_failure(tiny: Model, saved: Path, tmp_path: Path) -> None:
    config = TrainConfig(previews="a lion", preview_steps=2)
    draw = made(tiny, config, tmp_path, Stopped())
    assert draw is not None
    assert [list(draw(step, saved)) for step in (10, 20, 30)] == [[], [], []]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [({"preview_strengths": "0.5;1"}, "preview_strengths must be numbers"), ({"previews": "x|" * 65}, "at most 64")],
)
def test_settings_are_checked_before_training(previews: Make, setting: dict[str, str], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        previews(**setting)


def test_a_bare_denoiser_is_refused_before_training(tiny: Model, tmp_path: Path) -> None:
    bare = replace(tiny, components=replace(tiny.components, vae=None))
    with pytest.raises(ModelError, match="needs an autoencoder for pictures"):
        made(bare, TrainConfig(previews="a lion"), tmp_path)


def test_previews_run_in_trainings_dtype_on_gpus_alone(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    ampere = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32, "none": torch.float32}
    for capability, formats in {(8, 6): ampere, (7, 5): dict.fromkeys(ampere, torch.float32)}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        for name, expected in formats.items():
            config = TrainConfig(training_dtype=name)
            assert previewing._sampling_dtype(tiny.denoiser, config, gpu) == expected
            assert previewing._sampling_dtype(tiny.denoiser, config, cpu) == torch.float32


@pytest.mark.slow
def test_frames_show_the_base_above_the_newest_step(previews: Make, saved: Path) -> None:
    draw, frames = previews(), PreviewFrames(columns=1, cell=64)
    sizes = []
    for event in [*draw(10, saved), *draw(20, saved, final=True)]:
        with Image.open(io.BytesIO(frames(event))) as frame:
            assert frame.format == "JPEG"
            sizes.append(frame.height)
    base, step_10, step_20, halved = sizes
    assert base < step_10 == step_20 < halved


def test_a_frame_of_files_that_are_gone_is_none(tmp_path: Path) -> None:
    event = Previewed(step=1, prompts=("a lion",), paths=(str(tmp_path / "gone.png"),), strength=1.0)
    assert PreviewFrames()(event) is None
