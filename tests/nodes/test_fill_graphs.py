"""Graphs of Flux.1 Fill: InpaintModelConditioning, sampling inside of a mask, and training on masked pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_cases
import models
import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.core.errors import DataError, OptionError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.nodes.values import for_model
from tests.families.test_comfyui_families import GOLDEN, assert_same
from tests.nodes.graphs import Prompt, api, predicted_with, run, trained

RECORDED: dict[str, Any] = GOLDEN["families"]["flux1-fill"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folders with a small Fill, and pictures with their masks."""
    folder = tmp_path_factory.mktemp("comfyui")
    family_cases.fill_files(folder)
    rng = np.random.default_rng(0)
    for place in ("pictures", "masks"):
        (folder / "input" / place).mkdir(parents=True)
    for name in "ab":
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "input" / "pictures" / f"{name}.png")
        (folder / "input" / "pictures" / f"{name}.txt").write_text(f"paint {name}")
        mask = np.zeros((64, 64), np.uint8)
        mask[8:40, 16 if name == "a" else 32 :] = 255
        Image.fromarray(mask).save(folder / "input" / "masks" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def fill(base: Path) -> Model:
    folders = {one: base / "models" / one for one in ("diffusion_models", "text_encoders", "vae")}
    files = {name: sorted(one.glob("*.safetensors")) for name, one in folders.items()}
    (denoiser,), (vae,) = files["diffusion_models"], files["vae"]
    return load_model(denoiser, text_encoders=files["text_encoders"], vae=vae)


def inpainted(bench: Any, fill: Model, *, noise_mask: bool) -> tuple[list[Conditioning], Any]:
    """The outputs of the node for the recorded picture, mask and prompt."""
    pixels = (family_cases.picture().movedim(1, -1) + 1) / 2
    prompt = [fill.text_encoder.encode(family_cases.PROMPTS["short"])]
    prompt = bench.one("FluxGuidance", conditioning=prompt, guidance=30.0)
    given = {"positive": prompt, "negative": prompt, "vae": fill.autoencoder, "pixels": pixels}
    found = bench.call("InpaintModelConditioning", **given, mask=family_cases.mask(), noise_mask=noise_mask).outputs
    return found[0][0], found[2][0]


@pytest.mark.parametrize("inside", [True, False])
def test_the_node_and_sampling_are_comfyuis(bench: Any, fill: Model, inside: bool) -> None:
    positive, latent = inpainted(bench, fill, noise_mask=inside)
    for name in ("concat_latent_image", "concat_mask"):
        assert_same(name, positive[0].tensors[name], RECORDED[name])
    assert_same("latent", latent["samples"], RECORDED["latent"])
    assert ("noise_mask" in latent) == inside
    name = "sampled inside" if inside else "sampled"
    drawn = bench.one(
        "KSampler",
        model=fill.denoiser,
        seed=3,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=positive,
        negative=positive,
        latent_image=latent,
    )
    assert_same(name, drawn["samples"], RECORDED[name])
    outside = torch.nn.functional.interpolate(positive[0].tensors["concat_mask"], size=(8, 12), mode="bilinear") == 0
    stays = torch.allclose(drawn["samples"] * outside, latent["samples"] * outside, atol=1e-5)
    assert outside.any() and stays == inside


def test_predictions_are_comfyuis(bench: Any, fill: Model) -> None:
    (given,), latent = inpainted(bench, fill, noise_mask=False)
    plain = Conditioning({name: one for name, one in given.tensors.items() if not name.startswith("concat")})
    x = models.seeded("noisy", tuple(latent["samples"].shape), seed=0)
    for name, one in (("prediction", given), ("without", plain)):
        with torch.no_grad():
            found = fill.denoiser.predict(x, torch.tensor([family_cases.SIGMA]), for_model(one, fill, x))
        assert_same(name, found, RECORDED[name])
    denoiser = family_cases.lora(fill).applied_to(fill.denoiser)
    with denoiser.active(), torch.no_grad():
        changed = denoiser.predict(x, torch.tensor([family_cases.SIGMA]), for_model(given, fill, x))
    assert_same("with_lora", changed, RECORDED["with_lora"])


def test_other_models_ignore_it(bench: Any, fill: Model, tiny: Model, captions: list[Conditioning]) -> None:
    pixels, mask = torch.rand(1, 64, 64, 3), torch.ones(1, 64, 64)
    found = bench.call(
        "InpaintModelConditioning",
        positive=captions[:1],
        negative=captions[:1],
        vae=tiny.autoencoder,
        pixels=pixels,
        mask=mask,
    ).outputs
    (given,), latent = found[0][0], found[2][0]
    assert for_model(given, tiny, latent["samples"]).tensors.keys() == captions[0].tensors.keys()


def test_what_does_not_fit_is_said(bench: Any, fill: Model) -> None:
    (given,), _ = inpainted(bench, fill, noise_mask=False)
    with pytest.raises(
        DataError, match=r"must have the size of the latents, 8×8, got 12×8; use the latents of Inpaint"
    ):
        for_model(given, fill, torch.zeros(1, 16, 8, 8))
    with pytest.raises(DataError, match=r"a mask for each picture or one for all, got 3 for 2; add or remove some"):
        bench.call(
            "InpaintModelConditioning",
            positive=[given],
            negative=[given],
            vae=fill.autoencoder,
            pixels=torch.rand(2, 64, 64, 3),
            mask=torch.rand(3, 64, 64),
        )
    with pytest.raises(OptionError, match="channel must be red or green or blue"):
        bench.one("ImageToMask", image=torch.rand(1, 8, 8, 3), channel="alpha")


def training() -> Prompt:
    """Pictures and masks by the order of their names; each prompt has the known part of its picture."""
    return {
        "unet": api("UNETLoader", unet_name="flux1-fill-dev.safetensors", weight_dtype="default"),
        "clip": api(
            "DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"
        ),
        "vae": api("VAELoader", vae_name="ae.safetensors"),
        "pictures": api("LoadImageTextDataSetFromFolder", folder="pictures"),
        "masks": api("LoadImageDataSetFromFolder", folder="masks"),
        "mask": api("ImageToMask", image=["masks", 0], channel="red"),
        "text": api("CLIPTextEncode", text=["pictures", 1], clip=["clip", 0]),
        "guidance": api("FluxGuidance", conditioning=["text", 0], guidance=30.0),
        "fill": api(
            "InpaintModelConditioning",
            positive=["guidance", 0],
            negative=["guidance", 0],
            vae=["vae", 0],
            pixels=["pictures", 0],
            mask=["mask", 0],
            noise_mask=False,
        ),
        "train": trained(["fill", 2], ["fill", 0], batch_size=2, bucket_mode=False),
        "save": api("SaveLoRA", lora=["train", 0], prefix="loras/fill", steps=["train", 2]),
    }


def test_a_training_graph_trains_on_masked_pictures(base: Path, fill: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = predicted_with(monkeypatch)
    found = run(base, training())
    assert len(found["train"][1][0]["loss"]) == 2
    known = seen[-1].tensors["known"]
    assert known.shape == (2, 80, 8, 8)
    shares = sorted(known[:, 16:].mean((1, 2, 3)).tolist())
    assert shares == pytest.approx([32 * 32 / 64**2, 48 * 32 / 64**2], abs=1e-3)
