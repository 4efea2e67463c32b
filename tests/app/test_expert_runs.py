"""Both experts of a model: one command, one folder, each on its part of the noise levels."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clips import clip_model
from tiny_parts import randomized

from lorasmith.app.drawing import expert_named, experts_of
from lorasmith.app.expert_runs import ExpertRuns
from lorasmith.app.folder_source import FolderSource
from lorasmith.core.errors import OptionError
from lorasmith.data.data_config import DataConfig
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.base import Diffusion
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.families.model_search import Completed, ModelFiles
from lorasmith.formats.container import read_safetensors
from lorasmith.sampling import generate
from lorasmith.sampling.generate import Experts, Sampling, generate_clips
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Warned
from tests.data.video_cases import animation

HIGH, LOW = "wan_high_noise.safetensors", "wan_low_noise.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    high = clip_model(tmp_path_factory.mktemp("experts"))
    other = randomized(copy.deepcopy(high.components.denoiser), seed=1)
    low = replace(high, components=replace(high.components, denoiser=other))
    return {HIGH: replace(high, title=HIGH), LOW: replace(low, title=LOW)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    animation(tmp_path / "wave" / "1.webp", 6, milliseconds=200, size=(32, 32)).with_suffix(".txt").write_text("a wave")
    animation(tmp_path / "wave" / "2.webp", 1, size=(32, 32))
    return tmp_path / "wave"


def runs(models: dict[str, Model], images: Path, output: Path | None, **settings: Any) -> ExpertRuns:
    config = TrainConfig(**{"rank": 2, "targets": "attention", "steps": 3, "previews": "", **settings})

    def load(files: ModelFiles, _: object) -> Completed:
        return Completed(models[files.model], files)

    source = FolderSource.of(images, HIGH, name="wave", data=DataConfig())
    return ExpertRuns(source, LOW, config, output=output, load=load)  # type: ignore[arg-type]


def tensors(folder: Path, expert: str) -> dict[str, torch.Tensor]:
    return read_safetensors(folder / expert / f"wave_{expert}.safetensors")[0]


@pytest.mark.slow
def test_both_are_trained_each_on_its_range_and_resumed_to_the_bit(
    models: dict[str, Model], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    autoencoder = models[HIGH].autoencoder
    encode = type(autoencoder).encode
    monkeypatch.setattr(type(autoencoder), "encode", lambda self, one: (encoded.append(1), encode(self, one))[1])
    both = runs(models, images, tmp_path / "whole")
    assert [one.steps for one in both.run()] == [3, 3]
    assert len(encoded) <= 2, "the second expert has the samples of the first"
    for expert, limits in {"high_noise": (0.8, 1.0), "low_noise": (0.0, 0.8)}.items():
        record = json.loads((tmp_path / "whole" / expert / "run.json").read_text())
        assert (record["config"]["min_noise"], record["config"]["max_noise"]) == limits
        assert (tmp_path / "whole" / expert / "report.html").is_file()
        assert both.lora(expert) == tmp_path / "whole" / expert / f"wave_{expert}.safetensors"
    # Stopped on the way through the first, then on the way through the second.
    parts = tmp_path / "parts"
    assert [one.reason for one in runs(models, images, parts).run(until=1)] == ["cancelled"]
    second = runs(models, images, parts)
    second.train(second.prepare("high_noise"), "high_noise")
    second.train(second.prepare("low_noise"), "low_noise", until=2)
    heard: list[Event] = []
    assert len(runs(models, images, parts).run(on_event=heard.append)) == 1
    assert any("high_noise expert is trained already" in one.message for one in heard if isinstance(one, Warned))
    for expert in ("high_noise", "low_noise"):
        whole, resumed = tensors(tmp_path / "whole", expert), tensors(parts, expert)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), expert
    high, low = tensors(parts, "high_noise"), tensors(parts, "low_noise")
    assert high.keys() == low.keys() and not any(torch.equal(high[name], low[name]) for name in high)


@pytest.mark.slow
def test_without_an_output_the_unfinished_folder_is_continued(
    models: dict[str, Model], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs(models, images, None).run(until=1)
    assert [path.name for path in Path("runs").iterdir()] == ["wave-001"]
    assert len(runs(models, images, None).run()) == 2
    assert sorted(path.name for path in Path("runs/wave-001").iterdir()) == ["high_noise", "low_noise"]
    runs(models, images, None).run(until=1)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["wave-001", "wave-002"]


@pytest.mark.slow
def test_previews_are_drawn_by_both_experts(
    models: dict[str, Model], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int, int]] = []
    sample = generate.sample_latents

    def noted(predict: Any, **given: Any) -> Any:
        denoiser = predict.__self__
        drawn.append((denoiser.base.title, len(denoiser.patches), len(given["sigmas"]) - 1))
        return sample(predict, **given)

    monkeypatch.setattr(generate, "sample_latents", noted)
    settings = {"previews": "a wave", "preview_steps": 4, "preview_frames": 5, "preview_strengths": "1", "steps": 1}
    both = runs(models, images, tmp_path / "run", **settings)
    both.train(both.prepare("high_noise"), "high_noise")
    # The schedule is shifted by exp(1.15): of its 4 steps from 1.0, 0.90, 0.76, 0.51, two begin at 0.8 or above.
    assert drawn == [(HIGH, 0, 2), (LOW, 0, 2), (HIGH, 1, 2), (LOW, 0, 2)]
    drawn.clear()
    both.train(both.prepare("low_noise"), "low_noise")
    assert drawn == [(HIGH, 0, 2), (LOW, 0, 2), (HIGH, 1, 2), (LOW, 1, 2)]
    bases = [tmp_path / "run" / expert / "samples" / "base-1.webp" for expert in ("high_noise", "low_noise")]
    with Image.open(bases[0]) as one, Image.open(bases[1]) as other:
        assert one.convert("RGB").tobytes() == other.convert("RGB").tobytes()


@pytest.mark.slow
def test_one_expert_in_both_places_draws_as_one_model(models: dict[str, Model]) -> None:
    high = models[HIGH].denoiser
    sampling = Sampling(steps=4, frames=5, cfg=1.0, width=32, height=32)
    (alone,) = generate_clips(high, "a wave", sampling)
    (pair,) = generate_clips(Experts(high, high, 0.8), "a wave", sampling)
    (other,) = generate_clips(experts_of(high, models[LOW].denoiser), "a wave", sampling)
    whole, same, changed = (
        np.stack([np.array(one) for one in clip.frames]).astype(int) for clip in (alone, pair, other)
    )
    assert np.abs(same - whole).max() <= 1, "but for rounding where the second takes over"
    assert np.abs(changed - whole).max() > 5


def test_the_boundary_is_a_step_of_the_first_expert() -> None:
    tiny = load_model(BUILT_IN)
    flow = replace(tiny.denoiser, noising=Diffusion("flow", FlowSchedule(8.0, time_scale=1000.0)))
    pair = Experts(flow, flow, 0.875)
    sigmas = torch.tensor([1.0, 0.9, 0.875, 0.8, 0.0])
    assert [some.tolist() for _, some in pair.parts(sigmas)] == [
        pytest.approx([1.0, 0.9, 0.875, 0.8]),
        pytest.approx([0.8, 0.0]),
    ]
    assert len(pair.parts(sigmas[3:])) == 1


def test_what_is_no_pair_is_refused(images: Path) -> None:
    tiny = load_model(BUILT_IN)
    source = FolderSource.of(images, HIGH, name="wave", data=DataConfig())
    with pytest.raises(OptionError, match=r"low_noise_model is for models of two experts, .* got lorasmith-tiny"):
        expert_named(tiny, "high_noise")
    with pytest.raises(OptionError, match=r"min_noise is for a run on one expert, got 0\.5 with low_noise_model"):
        ExpertRuns(source, LOW, TrainConfig(min_noise=0.5))
    of_class = replace(source, data=DataConfig(class_prompt="a dog"))
    with pytest.raises(OptionError, match=r"class_images must be given with low_noise_model"):
        ExpertRuns(of_class, LOW, TrainConfig())


@pytest.mark.slow
def test_swapped_files_are_refused(models: dict[str, Model]) -> None:
    with pytest.raises(OptionError, match=r"the high_noise model must be that expert, but wan_low_noise.* swap them"):
        expert_named(models[LOW], "high_noise")
