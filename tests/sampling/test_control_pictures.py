"""Pictures from pictures: what `generate` does with controls, and previews of runs on pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformer_models import TINY, Case

import lorasmith
from lorasmith.core.errors import OptionError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Denoiser, Model
from lorasmith.sampling.generate import Sampling, encoded_controls, generate


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Case.of("flux2-klein", tmp_path_factory.mktemp("klein")).ours


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return TINY["flux1"].loaded(TINY["flux1"].saved(tmp_path_factory.mktemp("flux1")))


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_both_sides_of_guidance_have_the_controls(klein: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
    predict = Denoiser.predict

    def watched(self: Denoiser, latents: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        seen.append((tuple(latents.shape), [tuple(one.shape) for one in given.controls]))
        return predict(self, latents, time, given)

    monkeypatch.setattr(Denoiser, "predict", watched)
    (drawn,) = generate(klein, "a fox", controls=[picture(0, 70, 50), picture(1, 32, 32)], steps=1, cfg=2.0)
    assert drawn.size == (64, 48), "the size of the first control, cut to whole tokens"
    assert seen == [((2, 128, 3, 4), [(2, 128, 3, 4), (2, 128, 2, 2)])]
    monkeypatch.undo()
    other = generate(klein, "a fox", controls=[picture(2, 70, 50), picture(1, 32, 32)], steps=1, cfg=2.0)[0]
    assert other.tobytes() != drawn.tobytes()
    (large,) = generate(klein, "a fox", controls=[picture(0, 70, 50)], steps=1, width=32, height=64)
    assert large.size == (32, 64)


def test_controls_are_encoded_in_sizes_of_the_model(klein: Model, dev: Model) -> None:
    (one,) = encoded_controls(klein, [picture(0, 64, 32)], Sampling()).values()
    pixels = torch.from_numpy(np.array(picture(0, 64, 32))).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert torch.equal(one, klein.components.latent.to_model(klein.autoencoder.encode(pixels)))


def test_what_does_not_fit_is_refused_in_a_sentence(klein: Model, dev: Model, tiny: Model) -> None:
    def told(model: Model, count: int) -> str:
        with pytest.raises(OptionError) as caught:
            generate(model, "a fox", controls=[picture(0, 32, 32)] * count, steps=1)
        return str(caught.value)

    assert "takes at most 10 controls, got 11; leave some out" in told(klein, 11)
    assert "takes no controls, got 1; leave them out, or choose an edit model" in told(tiny, 1)
    assert "(Flux.1) takes no controls, got 1" in told(dev, 1)
    assert "edits pictures and needs one, got none; give it as a control" in told(dev.as_edit("kontext"), 0)
    generate(dev, "a fox", steps=1, width=32, height=32)
    generate(dev.as_edit("none"), "a fox", steps=1, width=32, height=32)


def test_the_library_takes_paths_and_pictures(klein: Model, tmp_path: Path) -> None:
    path = tmp_path / "before.png"
    picture(0, 32, 32).save(path)
    drawn: list[Any] = [
        lorasmith.generate(klein, "a fox", controls=given, steps=1, progress=False)[0].tobytes()
        for given in (path, str(path), picture(0, 32, 32), [path])
    ]
    assert len(set(drawn)) == 1
