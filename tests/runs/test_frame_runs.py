"""Runs on clips that are drawn from their first frame: samples, previews, what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_clips import small
from tiny_parts import original_tensors, randomized

from lorasmith.cli.main import main
from lorasmith.core.errors import DataError, ModelError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.random import keyed_uniform
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.dataset import places_of
from lorasmith.data.folder import scan_folder
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model_search import Completed
from lorasmith.runs.data_check import check_scan
from lorasmith.runs.expert_runs import ExpertRuns
from lorasmith.runs.memory_estimate import estimate_memory
from lorasmith.runs.model_list import list_models
from lorasmith.runs.plan import plan
from lorasmith.runs.run import run
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling.generate import Sampling, generate, generate_clips
from lorasmith.training.config import TrainConfig
from tests.data.video_cases import animation, movie
from tests.families.original_models import save
from tests.hosts import Audience


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folders with every kind of model."""
    folder = tmp_path_factory.mktemp("comfyui")
    for one in (tiny_wan.WAN, tiny_wan.WAN_I2V, tiny_wan.WAN21_I2V, tiny_wan.WAN21_FLF2V, tiny_wan.WAN_5B):
        one.saved(folder)
    tiny_wan.save_clip_vision(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of 6 frames at 5 a second, of which 5 are trained."""
    folder = tmp_path_factory.mktemp("clips")
    for name in "ab":
        size = (32, 32) if name == "a" else (64, 32)
        animation(folder / f"{name}.webp", 6, milliseconds=200, size=size).with_suffix(".txt").write_text(f"a {name}")
    return folder


class Small(Audience):
    """Small pictures and short clips, with parts that a model lacks from the folders beside it."""

    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        loaded = super().load(files, Folders(Path(files.model).parents[2]))
        return replace(loaded, model=small(loaded.model))


def asked(base: Path, clips: Path, model: str, **settings: Any) -> RunSpec:
    quick = {"rank": 2, "targets": "attention", "steps": 3, "previews": "", "resolution": 32}
    quick |= {"frames": 5, "frame_rate": 5.0}
    edit = settings.pop("edit", None)
    return RunSpec(
        sources=(ImageSource(str(clips)),),
        model=str(base / "models" / "diffusion_models" / model),
        name="cat",
        edit=edit,
        settings={**quick, **settings},
    ).resolved()


A14B, I2V, FLF2V, FIVE = (
    one.file for one in (tiny_wan.WAN_I2V, tiny_wan.WAN21_I2V, tiny_wan.WAN21_FLF2V, tiny_wan.WAN_5B)
)


def test_some_draws_of_5b_are_given_their_first_frame(base: Path, clips: Path) -> None:
    """The others are text to video, with the first frame in the loss."""
    ready = plan(asked(base, clips, FIVE, edit="i2v", control_dropout=0.5, resolution=64), Small())
    sample, seed, seen = ready.data.samples[0], 3, set()
    for draw in range(20):
        drawn, is_left_out = sample.drawn(seed, draw), keyed_uniform(seed, "controls", draw) < 0.5
        tensors = drawn.conditioning.tensors
        assert ("first_frame" in tensors) == (not is_left_out)
        places = places_of([drawn])
        if is_left_out:
            assert places is None
        else:
            torch.testing.assert_close(tensors["first_frame"][0], drawn.latents[:, :1], rtol=1e-4, atol=1e-4)
            assert places is not None and places.shape[2] == 2
            assert places[:, :, 0].eq(0).all() and places[:, :, 1].eq(2).all() and places.mean() == 1
        seen.add(is_left_out)
    assert seen == {True, False}


def test_without_an_edit_5b_trains_on_clips_as_text_to_video(base: Path, clips: Path) -> None:
    ready = plan(asked(base, clips, FIVE, resolution=64), Small())
    assert not any(one.conditioning.pictures for one in ready.data.samples)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("model", [I2V, FLF2V])
def test_wan21_trains_with_states_of_its_frames(base: Path, clips: Path, model: str, tmp_path: Path) -> None:
    ready = plan(replace(asked(base, clips, model), output=str(tmp_path / "run")), Small())
    rows = {one.conditioning.tensors["clip_vision"].shape[1] for one in ready.data.samples}
    assert rows == {257 if model == I2V else 514}
    assert "image encoder: clip_vision_h.safetensors (found in models/clip_vision)" in [
        one.line for one in ready.summary.found
    ]
    result = run(ready, Small())
    assert np.isfinite(result.losses).all()
    keys = load_file(tmp_path / "run" / "cat.safetensors")
    assert keys and not any("img" in name or "add_k" in name for name in keys), "nothing that text to video lacks"


def test_both_experts_train_on_their_part(base: Path, clips: Path, tmp_path: Path) -> None:
    """The boundary is 0.9, and not that of text to video."""
    tensors = original_tensors("wan-i2v", randomized(tiny_wan.WAN_I2V.denoiser(), seed=2))
    low = base / "models" / "diffusion_models" / "wan2.2_i2v_low_noise_14B_fp16.safetensors"
    save(low, {key: one.clone().contiguous() for key, one in tensors.items()})
    spec = replace(asked(base, clips, A14B, steps=1), low_noise_model=str(low), output=str(tmp_path / "both"))
    both = ExpertRuns(spec, Small())
    for expert, limits in {"high_noise": (0.9, 1.0), "low_noise": (0.0, 0.9)}.items():
        both.train(both.plan(expert))
        record = json.loads((tmp_path / "both" / expert / "run.json").read_text())
        assert (record["config"]["min_noise"], record["config"]["max_noise"]) == limits


def test_encodings_are_found_again(base: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(asked(base, clips, I2V), Small())
    monkeypatch.setattr("lorasmith.families.wan.picture_states", None)
    monkeypatch.setattr("lorasmith.families.model.Autoencoder.encode", None)
    plan(asked(base, clips, I2V), Small())


def test_what_cannot_be_trained_on_is_refused(base: Path, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"always draws from a picture, got control_dropout 0\.1"):
        plan(asked(base, clips, A14B, control_dropout=0.1), Small())
    with pytest.raises(DataError, match=r"takes none beside its images, but control is .*; leave control out"):
        plan(asked(base, clips, A14B, control=(str(tmp_path),)), Small())
    folder = tmp_path / "mixed"
    folder.mkdir()
    for one in clips.iterdir():
        (folder / one.name).write_bytes(one.read_bytes())
    Image.new("RGB", (32, 32)).save(folder / "c.png")
    with pytest.raises(DataError, match=r"at least 5 frames, but c\.png has one; remove it, or train it with a te"):
        plan(asked(base, folder, A14B), Small())
    (folder / "c.png").unlink()
    animation(folder / "d.webp", 4, milliseconds=200, size=(32, 32))
    with pytest.raises(DataError, match=r"but d\.webp has 4 frames at 5 a second; remove it"):
        plan(asked(base, folder, A14B), Small())
    ready = plan(asked(base, folder, FIVE, edit="i2v", resolution=64), Small())
    given = {one.name: "first_frame" in one.conditioning.tensors for one in ready.data.samples}
    assert given == {"a.webp": True, "b.webp": True, "d.webp": False}


def test_clips_shorter_than_the_frames_asked_for_are_noted(base: Path, clips: Path) -> None:
    model = Small().load(ModelFiles(str(base / "models" / "diffusion_models" / A14B)), None).model
    found = {}
    for frames in (5, 9, None):
        config = DataConfig(frames=frames, frame_rate=5.0)
        checked = check_scan(scan_folder(clips, config, clips=True), config, folder=clips, model=model)
        found[frames] = [one for one in checked.preflight.notes if "fewer than" in one]
    assert found[5] == found[None] == []
    assert found[9] == [
        "2 of 2 clips have fewer than 9 frames at 5 a second, such as a.webp with 5, and are trained whole; add longer "
        "ones, or lower frames"
    ]


def test_the_check_names_clips_that_are_resampled(base: Path, tmp_path: Path) -> None:
    model = Small().load(ModelFiles(str(base / "models" / "diffusion_models" / A14B)), None).model
    animation(tmp_path / "even.webp", 6, milliseconds=200, size=(64, 64))
    animation(tmp_path / "phone.webp", 6, milliseconds=[100, 100, 100, 500, 100, 100], size=(64, 64))
    movie(tmp_path / "slow.mp4", 14, 64, 64)

    def found(rate: float) -> list[str]:
        config = DataConfig(frame_rate=rate)
        checked = check_scan(scan_folder(tmp_path, config, clips=True), config, folder=tmp_path, model=model)
        return [one for one in checked.preflight.notes if "resampled" in one]

    assert found(5.0) == [
        "2 of 3 clips are resampled to 5 frames a second by time stamps, so that motion keeps its speed: phone.webp (2 "
        "to 10 a second, 1 of 5 frames repeated), slow.mp4 (10 a second)"
    ]
    assert "even.webp (5 a second, 2 of 5 frames repeated)" in found(10.0)[0]


def picture(folder: Path, name: str, size: tuple[int, int] = (50, 34)) -> Path:
    pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def test_the_command_line_draws_from_pictures(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, end = picture(tmp_path, "start.png"), picture(tmp_path, "end.png")
    monkeypatch.chdir(tmp_path)

    def draw(*arguments: str, model: str = FLF2V) -> int:
        command = f"lorasmith generate --model {model} --base-dir {base} --prompt fox --steps 1 --control {start}"
        monkeypatch.setattr(sys, "argv", [*command.split(), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert draw("--control", str(end), "--frames", "5") == 0
    with Image.open(next((tmp_path / "output").glob("*.webp"))) as drawn:
        assert drawn.size == (48, 32) and drawn.n_frames == 5
    assert draw("--frames", "5") != 0
    assert "draws from the first and the last frame, got one picture" in capsys.readouterr().err
    assert draw(model=A14B) != 0
    assert "frames must be at least 5 for a clip that" in capsys.readouterr().err


def test_clips_begin_with_the_picture_that_they_are_drawn_from(base: Path, tmp_path: Path) -> None:
    start = Image.open(picture(tmp_path, "start.png", (64, 64)))
    files = ModelFiles(str(base / "models" / "diffusion_models" / FIVE), edit="i2v")
    model = Small().load(files, Folders(base)).model
    sampling = Sampling(steps=2, frames=5, cfg=1.0, width=64, height=64)
    (clip,) = generate_clips(model, "a fox", sampling, controls=[start])
    with model.autoencoder.active():
        pixels = torch.from_numpy(np.array(start)).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = model.autoencoder.decode(model.autoencoder.encode(pixels))
    first = np.asarray(clip.frames[0], dtype=float) / 127.5 - 1
    assert np.abs(first - expected[0].permute(1, 2, 0).numpy()).max() < 0.02
    (without,) = generate_clips(model, "a fox", sampling)
    assert without.frames[0].tobytes() != clip.frames[0].tobytes()
    with pytest.raises(OptionError, match=r"^wan2\.2_ti2v.* takes at most 1 control, got 2; leave some out$"):
        generate(model, "a fox", controls=[start, start])
    i2v = Small().load(ModelFiles(str(base / "models" / "diffusion_models" / A14B)), Folders(base)).model
    with pytest.raises(OptionError, match=r"draws from a picture and needs one, got none; give it as a control$"):
        generate(i2v, "a fox")


def test_the_list_of_models_says_what_they_draw_from(base: Path) -> None:
    found = {one.path.name: one for one in list_models(Folders(base)).models}
    sources = {name: found[name].controls for name in (A14B, I2V, FLF2V, FIVE)}
    assert sources == {A14B: "first frame", I2V: "first frame", FLF2V: "first and last frame", FIVE: None}
    assert (found[FIVE].edits, found[FIVE].also) == ((), {"i2v": "first frame"})
    assert (found[FLF2V].edits, found[FLF2V].also) == ((), {})
    assert found[A14B].also == {"flf2v": "first and last frame"}
    assert [part.kind for part in found[I2V].parts] == ["umt5xxl", "clip_vision_h", "wan21"]
    assert [part.kind for part in found[A14B].parts] == ["umt5xxl", "wan21"]
    assert not list_models(Folders(base)).unused


def test_a_missing_image_encoder_is_named_before_anything_is_encoded(base: Path, clips: Path, tmp_path: Path) -> None:
    tiny_wan.WAN21_I2V.saved(tmp_path)
    with pytest.raises(ModelError, match=r"needs the image encoder clip_vision_h.*clip_vision_h\.safetensors"):
        plan(asked(tmp_path, clips, I2V), Small())


@pytest.mark.slow
def test_the_plan_counts_what_a_model_is_given(base: Path) -> None:
    """Channels beside the latents cost next to nothing; CLIP's rows and a time for each token do."""

    def kept(model: str, **other: str) -> int:
        files = ModelFiles(str(base / "models" / "diffusion_models" / model), **other)
        found = estimate_memory(files, TrainConfig(rank=2), card_bytes=2**33, resolution=64, frames=5)
        return found.plans[0].needed_bytes

    text, a14b, i2v, flf2v = kept("wan2.1_t2v_1.3B_fp16.safetensors"), kept(A14B), kept(I2V), kept(FLF2V)
    assert text == pytest.approx(a14b, rel=0.02) and a14b < i2v < flf2v
    assert kept(FIVE) < kept(FIVE, edit="i2v")
