"""What is particular to HunyuanVideo 1.5: names in files, quoted text, first frames, and variants that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import family_cases
import models
import numpy as np
import pytest
import torch
from original_models import save
from PIL import Image
from test_comfyui_families import GOLDEN, assert_same
from tiny_hunyuan_video15 import BYT5_WIDTH, HUNYUAN_VIDEO15, frames_of
from tiny_parts import original_tensors, randomized
from torch import Tensor, nn

from lorasmith.core.errors import DataError, ModelError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.hunyuan_video15 import _quoted
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.parts.clip_vision import picture_states
from lorasmith.families.slots import Encoding
from lorasmith.formats.spelling import guessed_family
from lorasmith.sampling.generate import Sampling, generate_clips
from lorasmith.sampling.sample import prepare_noise
from lorasmith.sampling.samplers import sigmas_for
from lorasmith.training.lora_handle import Lora

FRAMES = 5
PICTURE = 1152  # width of SigLIP's states


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return HUNYUAN_VIDEO15.saved(tmp_path_factory.mktemp("hunyuan"))


@pytest.fixture(scope="module")
def model(files: dict[str, Path]) -> Model:
    return HUNYUAN_VIDEO15.loaded(files)


def siglip() -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=PICTURE,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    return randomized(SiglipVisionModel(config))


@pytest.fixture(scope="module")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """SigLIP, and its file as ComfyUI users have it."""
    made = siglip()
    path = tmp_path_factory.mktemp("siglip") / "sigclip_vision_patch14_384.safetensors"
    return made, save(path, {f"vision_model.{name}": one.contiguous() for name, one in made.state_dict().items()})


@pytest.fixture(scope="module")
def from_pictures(files: dict[str, Path], image_encoder: tuple[nn.Module, Path]) -> Model:
    """The same model taken for image to video."""
    encoders = [files["text_encoder"], files["text_encoder_2"], image_encoder[1]]
    return load_model(files["transformer"], text_encoders=encoders, vae=files["vae"], edit="i2v")


def authors_own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ComfyUI's file as the authors publish them, where nothing is fused."""
    found = {}
    for name, tensor in tensors.items():
        if "_attn_qkv." in name:
            found |= {
                name.replace("_qkv.", f"_{part}."): one.clone()
                for part, one in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("naming", ["ComfyUI's model", "the authors' files"])
def test_files_of_other_namings_are_the_same_denoiser(naming: str, model: Model, tmp_path: Path) -> None:
    made = HUNYUAN_VIDEO15.parts()["transformer"]
    tensors = original_tensors("hunyuan-video15", made)
    assert "double_blocks.0.img_attn.qkv.weight" in tensors
    if naming == "the authors' files":
        tensors = authors_own(HUNYUAN_VIDEO15.denoiser_tensors())
        assert "double_blocks.1.txt_attn_k.bias" in tensors and not any("qkv" in name for name in tensors)
    state = load_model(save(tmp_path / "model.safetensors", tensors)).components.denoiser.state_dict()
    assert [name for name, one in made.state_dict().items() if not torch.equal(state[name], one)] == []


QUOTED = family_cases.prompts("hunyuan-video15")["quoted"]


def test_quoted_text_is_encoded_as_in_comfyui(model: Model) -> None:
    recorded = GOLDEN["families"]["hunyuan-video15"]
    ours = model.text_encoder.encode(QUOTED)
    for name, expected in recorded["conditioning"]["quoted"].items():
        assert_same(name, ours.tensors[name], expected)
    time = model.components.schedule.at_sigma(torch.tensor([family_cases.SIGMA])).time
    with torch.no_grad():
        assert_same("quoted", model.denoiser.predict(family_cases.noisy(model), time, ours), recorded["quoted"])


@torch.no_grad()
def test_predictions_from_a_first_frame_are_comfyuis(model: Model) -> None:
    first, states = family_cases.first_frame(model)
    x = family_cases.noisy(model, family_cases.FRAMES)
    known = torch.zeros(1, 33, *x.shape[2:])
    known[:, :32, :1], known[:, 32, 0] = model.components.latent.to_model(first), 1.0
    encoded = model.text_encoder.encode(family_cases.PROMPTS["short"])
    time = model.components.schedule.at_sigma(torch.tensor([family_cases.SIGMA])).time
    ours = model.denoiser.predict(x, time, encoded.with_pictures({"known": known, "clip_vision": states}))
    assert_same("first frame", ours, GOLDEN["families"]["hunyuan-video15"]["first frame"])


def test_quoted_text_is_encoded_as_in_diffusers(model: Model) -> None:
    """Each text once, and without what is in single quotation marks."""
    text = 'a sign "one" beside ‘two’ and “three”, then "one" again'
    encoder = replace(model.text_encoder, encoding=Encoding(lengths="diffusers"))
    with torch.no_grad():
        theirs = HUNYUAN_VIDEO15.conditioning(HUNYUAN_VIDEO15.made(), text)
    assert theirs["glyphs"].shape[1] == len('Text "one". Text "three". ') + 1
    for name, one in encoder.encode(text).tensors.items():
        torch.testing.assert_close(one, theirs[name], rtol=1e-4, atol=1e-5)


def test_marks_are_read_from_left_to_right() -> None:
    for text, found in [
        ('"a" b "c"', ["a", "c"]),
        ('"a “b” c"', ["a “b” c"]),
        ('“a" "b', [" "]),
        ('"a\nb"', []),
        ('""', [""]),
    ]:
        assert list(_quoted(text, ('"', '"'), ("“", "”"))) == found


def given(batch: int = 1) -> dict[str, Tensor]:
    """Every input that the network can have beside the latents."""
    shapes = {"context": (7, 32), "glyphs": (5, BYT5_WIDTH), "known": (33, 2, 4, 6), "clip_vision": (9, PICTURE)}
    return {name: models.seeded(name, (batch, *shape), seed=0) for name, shape in shapes.items()}


@pytest.mark.parametrize("left_out", [(), ("known",), ("glyphs",), ("glyphs", "clip_vision")], ids=str)
@torch.no_grad()
def test_predictions_are_those_of_diffusers_with_any_inputs(model: Model, left_out: tuple[str, ...]) -> None:
    tensors = {name: one for name, one in given().items() if name not in left_out}
    latents, time = models.seeded("latents", (1, 32, 2, 4, 6), seed=0), torch.tensor([600.0])
    theirs = HUNYUAN_VIDEO15.call(HUNYUAN_VIDEO15.parts()["transformer"], latents, tensors, time)
    ours = model.denoiser.predict(latents, time, Conditioning(tensors))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_of_the_text_changes_nothing(model: Model) -> None:
    tensors = given()
    padded = {**tensors, "context": torch.cat((tensors["context"], torch.full((1, 3, 32), 7.0)), dim=1)}
    mask = torch.tensor([[True] * 7 + [False] * 3])
    latents, time = models.seeded("latents", (1, 32, 2, 4, 6), seed=0), torch.tensor([600.0])
    predictions = [
        model.denoiser.predict(latents, time, one) for one in (Conditioning(tensors), Conditioning(padded, mask=mask))
    ]
    torch.testing.assert_close(*predictions, rtol=1e-5, atol=1e-5)


def test_known_frames_of_another_size_are_refused(model: Model) -> None:
    latents = torch.zeros(1, 32, 2, 4, 4)
    with pytest.raises(
        DataError, match=r"known of a conditioning .* must be \(batch, 33, 2, 4, 4\), got \(1, 33, 2, 4, 6\)"
    ):
        model.denoiser.predict(latents, torch.tensor([600.0]), Conditioning(given()))


@torch.no_grad()
def test_a_clip_has_the_latents_of_diffusers_and_back(model: Model) -> None:
    """Whose attention masks pairs of latents, where ours goes from frame to frame."""
    vae = HUNYUAN_VIDEO15.parts()["vae"]
    clip = models.seeded("clip", (1, 3, 2 * FRAMES - 1, 32, 48), seed=0, std=0.4).clamp(-1, 1)
    ours = model.autoencoder.encode(clip)
    torch.testing.assert_close(ours, vae.encode(clip).latent_dist.mode(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.autoencoder.decode_frames(ours), vae.decode(ours).sample.clamp(-1, 1), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_large_clips_are_tiled_and_large_pictures_are_not(model: Model) -> None:
    vae = HUNYUAN_VIDEO15.parts()["vae"]
    clip = models.seeded("clip", (1, 3, FRAMES, 32, 288), seed=0, std=0.4).clamp(-1, 1)
    tiled, whole = vae.tiled_encode(clip)[:, :32], vae.encoder(clip)[:, :32]
    torch.testing.assert_close(model.autoencoder.encode(clip), tiled, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiled, whole, atol=1e-3)
    picture = vae.encode(clip[:, :, :1]).latent_dist.mode()
    torch.testing.assert_close(model.autoencoder.encode(clip[:, :, 0]), picture, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_clips_are_those_of_diffusers(model: Model, guidance: float) -> None:
    steps = 3
    sampling = Sampling(seed=3, steps=steps, scheduler="simple", cfg=guidance, width=96, height=64, frames=FRAMES)
    encoder = replace(model.text_encoder, encoding=Encoding(lengths="diffusers"))
    (ours,) = generate_clips(model, 'a "fox"', sampling=sampling, text_encoder=encoder)
    sigmas = sigmas_for(model.components.schedule, "simple", steps)
    noise = prepare_noise(3, (1, *model.components.latent.shape(64, 96, FRAMES)))
    arguments = {"latents": noise, "sigmas": sigmas[:-1].tolist(), "num_inference_steps": steps, "num_frames": FRAMES}
    arguments |= {"height": 64, "width": 96, "prompt": 'a "fox"'}
    theirs = frames_of(HUNYUAN_VIDEO15.made(), arguments, guidance)
    pairs = [(np.asarray(one, int), np.asarray(other, int)) for one, other in zip(ours.frames, theirs, strict=True)]
    assert max(np.abs(one - other).max() for one, other in pairs) <= 1
    assert np.abs(pairs[0][0] - pairs[-1][0]).mean() > 1, "frames differ"


def test_image_to_video_is_told_by_the_name_alone(files: dict[str, Path], tmp_path: Path) -> None:
    named = tmp_path / "hunyuanvideo1.5_480p_i2v_fp16.safetensors"
    named.symlink_to(files["transformer"])
    forms = [load_model(path).control_form for path in (files["transformer"], named)]
    assert forms[0].need == "none" and forms[1].source == "first frame"
    assert load_model(named, edit="none").control_form.need == "none"


@torch.no_grad()
def test_a_first_frame_is_what_diffusers_makes_of_it(
    from_pictures: Model, image_encoder: tuple[nn.Module, Path]
) -> None:
    """SigLIP sees a picture of its own size, which neither program scales; the autoencoder a small one."""
    from diffusers import HunyuanVideo15ImageToVideoPipeline
    from transformers import SiglipImageProcessor

    parts = {**HUNYUAN_VIDEO15.dressed(HUNYUAN_VIDEO15.parts()), "image_encoder": image_encoder[0]}
    pipeline = HunyuanVideo15ImageToVideoPipeline(
        **parts, scheduler=None, feature_extractor=SiglipImageProcessor(size={"height": 384, "width": 384})
    )

    def made(side: int) -> tuple[Image.Image, Tensor]:
        colours = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
        pixels = torch.zeros(1, 3, FRAMES, side, side)
        pixels[0, :, 0] = torch.from_numpy(colours).movedim(-1, 0) / 127.5 - 1
        return Image.fromarray(colours), pixels

    picture, pixels = made(64)
    latents = torch.zeros(1, *from_pictures.components.latent.shape(64, 64, FRAMES))
    known = pipeline.prepare_cond_latents_and_mask(latents, picture, 1, 64, 64, torch.float32, torch.device("cpu"))
    ours, encoder = from_pictures.picture_inputs(pixels), from_pictures.components.image_encoder
    torch.testing.assert_close(ours["known"], torch.cat(known, dim=1), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours["clip_vision"], picture_states(encoder, pixels[:, :, 0], crop=True))
    picture, pixels = made(384)
    states = pipeline.encode_image(picture, 1, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(picture_states(encoder, pixels[:, :, 0], crop=True), states, rtol=1e-4, atol=1e-4)


def test_a_first_frame_needs_the_image_encoder(files: dict[str, Path], image_encoder: tuple[nn.Module, Path]) -> None:
    encoders = [files["text_encoder"], files["text_encoder_2"]]
    without = load_model(files["transformer"], text_encoders=encoders, vae=files["vae"], edit="i2v")
    with (
        pytest.raises(ModelError, match=r"needs the image encoder siglip_384, .*sigclip_vision_patch14_384"),
        without.encodes_pictures(),
    ):
        raise AssertionError("it has no image encoder")
    with pytest.raises(ModelError, match=r"is the image encoder siglip_384, but HunyuanVideo 1\.5 has qwen25vl"):
        load_model(files["transformer"], text_encoders=[image_encoder[1]])


@pytest.mark.parametrize("naming", ["musubi-tuner", "ComfyUI"])
def test_loras_of_musubi_tuner_are_read(naming: str, model: Model, tmp_path: Path) -> None:
    """Its network has the authors' names; its converter writes ComfyUI's, with three times the rank."""
    tensors, rank, width = {}, 6 if naming == "ComfyUI" else 2, 128
    layers = (
        {"img_attn_q": width, "img_attn_k": width, "img_attn_v": width} if rank == 2 else {"img_attn_qkv": 3 * width}
    )
    inner, modulation = ("mlp_fc1", "mod_linear") if rank == 2 else ("mlp_0", "mod_lin")
    layers |= {"txt_attn_proj": width, f"img_{inner}": 4 * width, f"txt_{modulation}": 6 * width}
    for layer, rows in layers.items():
        start = f"lora_unet_double_blocks_0_{layer}"
        for name, shape in (("lora_down.weight", (rank, width)), ("lora_up.weight", (rows, rank))):
            tensors[f"{start}.{name}"] = models.seeded(f"{start}.{name}", shape, seed=0)
    state = Lora.load(save(tmp_path / "lora.safetensors", tensors), model).state
    block = "transformer_blocks.0."
    attention = {f"{block}attn.to_{part}" for part in "qkv"}
    others = {f"{block}attn.to_add_out", f"{block}ff.net.0.proj", f"{block}norm1_context.linear"}
    assert state.unknown == {} and {ref.path for ref in state.adapters} == attention | others


def test_its_loras_are_told_from_others() -> None:
    for base, width, family in [
        ("lora_unet_double_blocks_0_img_attn_q", 2048, "HunyuanVideo 1.5"),
        ("lora_unet_double_blocks_3_txt_mlp_fc2", 8192, "HunyuanVideo 1.5"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 2048, "HunyuanVideo 1.5"),
        ("diffusion_model.double_blocks.0.img_mod.lin", 2048, "HunyuanVideo 1.5"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", 2048, "HunyuanVideo 1.5"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "Flux.1"),
    ]:
        assert guessed_family({f"{base}.lora_down.weight": (4, width)}) == family
