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

from lorasmith.core.errors import ModelError, OptionError
from lorasmith.data.data_config import ImageSource
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Denoiser, Model
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling.generate import generate


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


def test_previews_and_their_negative_prompts_have_the_pictures(
    qwen: dict[str, Path], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    predict = Denoiser.predict

    def watched(self: Denoiser, latents: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        seen.extend((length, len(given.controls)) for length in given.lengths)
        return predict(self, latents, time, given)

    quick = {"previews": "blue", "preview_steps": 1, "preview_strengths": "1", "flip": False, "control_dropout": 0.0}
    spec = asked(qwen, pairs, steps=1, **quick)
    ready = plan(replace(spec, output=str(tmp_path / "run")), Host())
    monkeypatch.setattr(Denoiser, "predict", watched)
    result = run(ready, Host())
    assert result.folder is not None and len(list((result.folder / "samples").glob("control-1.png"))) == 1
    with safe_open(result.folder / "cat.safetensors", framework="pt") as lora:
        assert lora.metadata()["modelspec.architecture"] == "Qwen-Image-Edit-2511/lora"
    # "Picture 1: ", two marks with four tokens of 56×56 px between them, "blue" or nothing, the opening of the answer
    assert set(seen) == {(5 + 2 + 4 + words + 5, 1) for words in (0, 1)}


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
