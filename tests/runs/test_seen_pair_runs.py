"""Runs on pairs whose controls the text encoder sees: previews, resuming, drawing from pictures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformer_models import TINY

from lorasmith.cli.main import main
from lorasmith.core.errors import ModelError, OptionError
from lorasmith.data.data_config import ImageSource
from lorasmith.families.base import FAMILIES, Conditioning
from lorasmith.families.model import Denoiser, Model
from lorasmith.runs.memory_estimate import estimate_of
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling.generate import generate
from lorasmith.training.config import TrainConfig
from tests.hosts import Audience
from tests.runs.folder_cases import tensors_of


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small Qwen-Image-Edit 2511 by the name of its file."""
    files = dict(TINY["qwen-image"].saved(tmp_path_factory.mktemp("qwen")))
    place = files["transformer"]
    files["transformer"] = place.rename(place.with_name("qwen_image_edit_2511_bf16.safetensors"))
    return files


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls of 64×64 px, of which 56×56 are seen, instead of a megapixel."""
    module = sys.modules[type(FAMILIES["qwen-image"]).__module__]
    names = {
        name: replace(form, most_pixels=64**2, sight=replace(form.sight, pixels=56**2))
        for name, form in module._EDIT_NAMES.items()
    }
    monkeypatch.setattr(module, "_EDIT_NAMES", names)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for place in ("after", "before"):
        (folder / place).mkdir()
        for name in "abc":
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / place / f"{name}.png")
    return folder


def asked(qwen: dict[str, Path], pairs: Path, **settings: Any) -> RunSpec:
    quick = {"rank": 2, "targets": "*.attn.to_q", "steps": 4, "previews": "", "resolution": 64, "flip": True}
    return RunSpec(
        sources=(ImageSource(str(pairs / "after")),),
        model=str(qwen["transformer"]),
        text_encoders=(str(qwen["text_encoder"]),),
        vae=str(qwen["vae"]),
        name="cat",
        settings={**quick, "control": (str(pairs / "before"),), "trigger": "blue", "control_dropout": 0.25, **settings},
    ).resolved()


@pytest.mark.slow
def test_a_run_is_resumed_to_the_bit(
    qwen: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = asked(qwen, pairs)
    whole = run(plan(replace(spec, output="whole"), Host()), Host())
    stopped = run(plan(replace(spec, output="stopped"), Host()), Audience(stop_at=2))
    assert len(stopped.losses) == 2 and stopped.folder is not None and whole.folder is not None
    with safe_open(whole.folder / "cat.safetensors", framework="pt") as lora:
        assert lora.metadata()["modelspec.architecture"] == "Qwen-Image-Edit-2511/lora"
    again = run(plan(replace(spec, output="stopped"), Host()), Host())
    assert tensors_of(stopped.folder) == tensors_of(whole.folder)
    assert again.losses == whole.losses


def test_previews_and_their_negative_prompts_have_the_pictures(
    qwen: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    predict = Denoiser.predict

    def watched(self: Denoiser, latents: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        seen.extend((length, len(given.controls)) for length in given.lengths)
        return predict(self, latents, time, given)

    spec = asked(qwen, pairs, steps=1, previews="blue", flip=False, control_dropout=0.0)
    ready = plan(replace(spec, output=str(tmp_path / "run")), Host())
    monkeypatch.setattr(Denoiser, "predict", watched)
    result = run(ready, Host())
    assert result.folder is not None and len(list((result.folder / "samples").glob("control-1.png"))) == 1
    # "Picture 1: ", two marks with four tokens of 56×56 px between them, "blue" or nothing, the opening of the answer
    assert set(seen) == {(5 + 2 + 4 + words + 5, 1) for words in (0, 1)}


def test_the_command_line_draws_from_a_picture(
    qwen: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [f"--model={qwen['transformer']}", f"--text-encoder={qwen['text_encoder']}", f"--vae={qwen['vae']}"]
    control = f"--control={pairs / 'before' / 'a.png'}"
    command = ["lorasmith", "generate", *files, control, "--prompt=blue", "--steps=1", "--output=drawn"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    (drawn,) = (tmp_path / "drawn").glob("*.png")
    with Image.open(drawn) as picture:
        assert picture.size == (64, 64)


@pytest.mark.slow
def test_other_pictures_are_other_prompts(qwen: dict[str, Path], pairs: Path) -> None:
    model = TINY["qwen-image"].loaded(qwen)
    with Image.open(pairs / "before" / "a.png") as one, Image.open(pairs / "before" / "b.png") as other:
        controls = [one.convert("RGB"), other.convert("RGB")]
    drawn = [
        generate(model, "blue", controls=given, steps=1, cfg=1.0)[0].tobytes()
        for given in (controls[:1], controls[1:], controls, controls[::-1])
    ]
    assert len(set(drawn)) == 4, "order counts"


def test_what_does_not_fit_is_refused_in_a_sentence(qwen: dict[str, Path], pairs: Path) -> None:
    model = TINY["qwen-image"].loaded(qwen)
    with Image.open(pairs / "before" / "a.png") as picture:
        control = picture.convert("RGB")

    def told(kind: type[Exception], model: Model, count: int) -> str:
        with pytest.raises(kind) as caught:
            generate(model, "a fox", controls=[control] * count, steps=1)
        return str(caught.value)

    assert "edits pictures and needs one, got none; give it as a control" in told(OptionError, model, 0)
    assert "takes at most 10 controls, got 11; leave some out" in told(OptionError, model, 11)
    assert "takes at most 1 control, got 2; leave some out" in told(OptionError, model.as_edit("edit"), 2)
    assert "(Qwen-Image) takes no controls, got 1" in told(OptionError, model.as_edit("none"), 1)
    components = replace(model.components, text_encoders={})
    assert "needs the text encoder qwen25vl" in told(ModelError, replace(model, components=components), 1)


@pytest.mark.slow
def test_the_memory_plan_counts_tokens_of_controls_and_of_what_is_seen(
    qwen: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, int]] = []
    predict = Denoiser.predict

    def watched(self: Denoiser, latents: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        counted.append((given.tensors["context"].shape[1], len(given.controls)))
        return predict(self, latents, time, given)

    monkeypatch.setattr(Denoiser, "predict", watched)
    encoders = list[int]()
    for count, tokens in ((0, 64), (1, 64 + 4), (3, 64 + 12)):
        counted.clear()
        found = estimate_of(
            TINY["qwen-image"].loaded(qwen),
            TrainConfig(rank=2, targets="*.attn.to_q"),
            card_bytes=2**34,
            resolution=64,
            controls=count,
        )
        assert found.controls == ((64, 64),) * count
        encoders.append(found.text_encoders["text_encoder"])
        assert set(counted) == {(tokens, count)}
    assert encoders[0] < encoders[1] == encoders[2], "the tower counts where it is needed"
