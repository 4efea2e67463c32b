"""Runs of Flux.1 Fill on masked pictures: from the command line to a LoRA that fills, with previews and report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import fill_files
from PIL import Image
from test_transformer_loras import change, layers_of_diffusers
from tiny_flux import FLUX1

from lorasmith.data.data_config import ImageSource
from lorasmith.report.contact_sheet import pair_stems
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from lorasmith.training.lora_handle import Lora


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return fill_files(tmp_path_factory.mktemp("fill"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures with their masks."""
    folder = tmp_path_factory.mktemp("photos")
    for index, name in enumerate("ab"):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        mask = np.zeros((64, 64), np.uint8)
        mask[16:, : 32 + 16 * index] = 255
        Image.fromarray(mask).save(folder / f"{name}.mask.png")
    return folder


def asked(files: dict[str, Path], photos: Path, **settings: Any) -> RunSpec:
    quick = {"rank": 2, "targets": "all-linear", "steps": 2, "resolution": 64, "masks": "files", "trigger": "a fox"}
    return RunSpec(
        sources=(ImageSource(str(photos)),),
        model=str(files["transformer"]),
        text_encoders=(str(files["text_encoder"]), str(files["text_encoder_2"])),
        vae=str(files["vae"]),
        name="cat",
        settings={**quick, "previews": "", **settings},
    ).resolved()


@pytest.mark.slow
def test_previews_fill_the_masks_of_pictures(files: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    spec = asked(files, photos, previews="a fox | a bus", preview_steps=1, preview_strengths="1")
    result = run(plan(replace(spec, output=str(tmp_path / "run")), Host()), Host())
    assert result.folder is not None
    samples = result.folder / "samples"
    assert pair_stems(samples) == ["control", "mask", "target"]
    for number, name in enumerate("ab", start=1):
        with Image.open(samples / f"mask-{number}.png") as shown, Image.open(photos / f"{name}.mask.png") as mask:
            assert np.array_equal(np.asarray(shown.convert("L")), np.asarray(mask))
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert re.search(r"--control \S*samples/control-1\.png --mask \S*samples/mask-1\.png", page)


def test_diffusers_applies_all_of_its_lora(files: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline

    ready = plan(
        replace(asked(files, photos, learning_rate=0.05, lora_dtype="fp32"), output=str(tmp_path / "run")), Host()
    )
    assert ready.denoiser is not None
    result = run(ready, Host())
    path = result.lora.save(tmp_path / "lora.safetensors", layout="diffusers")
    network = FLUX1.denoiser(in_channels=384, out_channels=64)
    pipeline = FluxFillPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **FLUX1.parts() | {"transformer": network})
    pipeline.load_lora_weights(str(path))
    applied = layers_of_diffusers(pipeline.transformer)
    lora = Lora.load(path, ready.denoiser.base)
    assert applied.keys() == {ref.path for ref in lora.state.adapters} and "x_embedder" in applied
    for ref, weights in lora.state.adapters.items():
        torch.testing.assert_close(applied[ref.path], change(weights), rtol=1e-4, atol=1e-6)
