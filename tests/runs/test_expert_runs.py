"""Both experts of a model: one command, one folder, each on its part of the noise levels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clips import expert_files, small
from tiny_wan import WAN, frames_of

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.data_config import ImageSource
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.forms import Diffusion
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN, ModelFiles
from lorasmith.families.model import Autoencoder, Model
from lorasmith.families.model_search import Completed
from lorasmith.formats.container import read_safetensors
from lorasmith.runs.drawing import expert_named, experts_of
from lorasmith.runs.expert_runs import ExpertRuns
from lorasmith.runs.run import Host
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling import generate
from lorasmith.sampling.generate import Experts, Sampling, generate_clips
from lorasmith.sampling.sample import prepare_noise
from lorasmith.sampling.samplers import sigmas_for
from lorasmith.training.events import Warned
from lorasmith.training.results import TrainResult
from tests.data.video_cases import animation
from tests.hosts import Audience

NAMES = ("high_noise", "low_noise")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return expert_files(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    animation(tmp_path / "wave" / "1.webp", 6, milliseconds=200, size=(32, 32)).with_suffix(".txt").write_text("a wave")
    animation(tmp_path / "wave" / "2.webp", 1, size=(32, 32))
    return tmp_path / "wave"


class Small(Audience):
    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        loaded = super().load(files, folders)
        return replace(loaded, model=small(loaded.model))


def runs(
    files: dict[str, Path], images: Path, output: Path | None, host: Host | None = None, **settings: Any
) -> ExpertRuns:
    spec = RunSpec(
        sources=(ImageSource(str(images)),),
        model=str(files["high_noise"]),
        low_noise_model=str(files["low_noise"]),
        name="wave",
        output=None if output is None else str(output),
        text_encoders=(str(files["text_encoder"]),),
        vae=str(files["vae"]),
        settings={"rank": 2, "targets": "attention", "steps": 3, "previews": "", **settings},
    )
    return ExpertRuns(spec, host or Small())


def trained(both: ExpertRuns, until: int | None = None) -> list[TrainResult]:
    """Train both, unless the first run is cancelled."""
    results = []
    for expert in NAMES:
        result = both.train(replace(both.plan(expert), until=until))
        results += [] if result is None else [result]
        if result is not None and result.reason == "cancelled":
            break
    return results


def experts(files: dict[str, Path]) -> list[Model]:
    encoders, vae = [files["text_encoder"]], files["vae"]
    return [small(load_model(files[name], text_encoders=encoders, vae=vae)) for name in NAMES]


def tensors(folder: Path, expert: str) -> dict[str, torch.Tensor]:
    return read_safetensors(folder / expert / f"wave_{expert}.safetensors")[0]


@pytest.mark.slow
def test_both_are_trained_each_on_its_range_and_the_unfinished_folder_is_resumed_to_the_bit(
    files: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encoded: list[int] = []
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, one: (encoded.append(1), encode(self, one))[1])
    both = runs(files, images, tmp_path / "whole")
    assert [one.steps for one in trained(both)] == [3, 3]
    assert len(encoded) <= 2, "the second expert has the samples of the first"
    for expert, limits in {"high_noise": (0.875, 1.0), "low_noise": (0.0, 0.875)}.items():
        record = json.loads((tmp_path / "whole" / expert / "run.json").read_text())
        assert (record["config"]["min_noise"], record["config"]["max_noise"]) == limits
        assert (tmp_path / "whole" / expert / "report.html").is_file()
        assert both.lora(expert) == tmp_path / "whole" / expert / f"wave_{expert}.safetensors"
    # Stopped on the way through the first, then on the way through the second.
    parts = tmp_path / "runs" / "wave-001"
    assert [one.reason for one in trained(runs(files, images, None), until=1)] == ["cancelled"]
    second = runs(files, images, None)
    second.train(second.plan("high_noise"))
    second.train(replace(second.plan("low_noise"), until=2))
    host = Small()
    assert len(trained(runs(files, images, None, host))) == 1
    assert any("high_noise expert is trained already" in one.message for one in host.events if isinstance(one, Warned))
    for expert in ("high_noise", "low_noise"):
        whole, resumed = tensors(tmp_path / "whole", expert), tensors(parts, expert)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), expert
    high, low = tensors(parts, "high_noise"), tensors(parts, "low_noise")
    assert high.keys() == low.keys() and not any(torch.equal(high[name], low[name]) for name in high)
    assert sorted(path.name for path in parts.parent.iterdir()) == ["wave-001"]


@pytest.mark.slow
def test_previews_are_drawn_by_both_experts(
    files: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int, int]] = []
    sample = generate.sample_latents

    def noted(predict: Any, **given: Any) -> Any:
        denoiser = predict.__self__
        drawn.append((denoiser.base.title, len(denoiser.patches), len(given["sigmas"]) - 1))
        return sample(predict, **given)

    monkeypatch.setattr(generate, "sample_latents", noted)
    settings = {"previews": "a wave", "preview_steps": 4, "preview_frames": 5, "preview_strengths": "1", "steps": 1}
    host = Small()
    both = runs(files, images, tmp_path / "run", host, **settings)
    both.train(both.plan("high_noise"))
    # The schedule is shifted: two of its 4 steps begin at 0.875 or above.
    high, low = files["high_noise"].stem, files["low_noise"].stem
    assert drawn == [(high, 0, 2), (low, 0, 2), (high, 1, 2), (low, 0, 2)]
    drawn.clear()
    both.train(both.plan("low_noise"))
    assert not [one for one in host.events if isinstance(one, Warned) and "preview" in one.message]
    assert drawn == [(high, 0, 2), (low, 0, 2), (high, 1, 2), (low, 1, 2)]
    bases = [tmp_path / "run" / expert / "samples" / "base-1.webp" for expert in ("high_noise", "low_noise")]
    with Image.open(bases[0]) as one, Image.open(bases[1]) as other:
        assert one.convert("RGB").tobytes() == other.convert("RGB").tobytes()


@pytest.mark.slow
def test_two_experts_draw_the_pipelines_clip(files: dict[str, Path]) -> None:
    import diffusers

    high, low = experts(files)
    sampling = Sampling(seed=3, steps=4, frames=5, cfg=3.0, width=64, height=48, scheduler="simple")
    (ours,) = generate_clips(experts_of(high.denoiser, low.denoiser), "a wave", sampling)
    sigmas = sigmas_for(high.components.schedule, "simple", 4, sampler="euler")
    assert [bool(one >= 0.875) for one in sigmas[:-1]] == [True, True, True, False]
    pipeline = diffusers.WanPipeline(
        **{**WAN.parts(), "transformer": high.components.denoiser},
        transformer_2=low.components.denoiser,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False),
        boundary_ratio=0.875,
    )
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "latents": prepare_noise(3, (1, *high.components.latent.shape(48, 64, 5))),
        "sigmas": sigmas[:-1].tolist(),
        "num_inference_steps": 4,
        "num_frames": 5,
        "height": 48,
        "width": 64,
        "prompt": "a wave",
        "negative_prompt": "",
    }
    theirs = frames_of(pipeline, arguments, 3.0)
    assert len(ours.frames) == len(theirs) == 5
    for mine, other in zip(ours.frames, theirs, strict=True):
        assert np.abs(np.asarray(mine, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


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
    spec = RunSpec(sources=(ImageSource(str(images)),), model=BUILT_IN, low_noise_model=BUILT_IN)
    with pytest.raises(OptionError, match=r"low_noise_model is for models of two experts, .* got lorasmith-tiny"):
        expert_named(tiny, "high_noise")
    with pytest.raises(OptionError, match=r"min_noise is for a run on one expert, got 0\.5 with low_noise_model"):
        ExpertRuns(spec.with_settings(min_noise=0.5), Host())
    with pytest.raises(OptionError, match=r"class_images must be given with low_noise_model"):
        ExpertRuns(spec.with_settings(class_prompt="a dog"), Host())


@pytest.mark.slow
def test_swapped_files_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(
        OptionError, match=r"the high_noise model must be that expert, but wan2\.2_t2v_low_noise.* swap them"
    ):
        experts_of(*reversed([one.denoiser for one in experts(files)]))
