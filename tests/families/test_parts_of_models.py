"""Models put together from parts: each from a file of its own, a checkpoint or a folder, known by its tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf_files
import models
import packed_files
import pytest
import torch
from original_models import SD1, clip_l, openclip, save
from safetensors.torch import load_file
from torch import Tensor

from lorasmith.adapters.frozen_layer import packed_layers
from lorasmith.core.errors import ModelError
from lorasmith.core.placement import placed
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.part_loading import load_autoencoder, load_text_encoder
from lorasmith.families.parts.autoencoders import AUTOENCODERS
from lorasmith.families.parts.encoders import ENCODERS
from tests.covering import slow_except

UNET, VAE = "model.diffusion_model.", "first_stage_model."
ENCODER = "cond_stage_model.transformer."


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, sdxl_file: Path) -> dict[str, Path]:
    """A whole checkpoint of Stable Diffusion 1, each of its parts in a file of its own, and other families."""
    folder = tmp_path_factory.mktemp("parts")
    tensors = {name: t for name, t in SD1.tensors().items() if not name.startswith("cond_stage_model.")}
    tensors |= {f"{ENCODER}{name}": t for name, t in clip_l().items()}
    parts = {"unet": under(UNET, tensors), "vae": under(VAE, tensors), "clip_l": under(ENCODER, tensors)}
    saved = {name: save(folder / f"{name}.safetensors", part) for name, part in parts.items()}
    clip_g = under("cond_stage_model.model.", openclip(layers=32))
    return {
        **saved,
        "whole": save(folder / "whole.safetensors", tensors),
        "clip_g": save(folder / "clip_g.safetensors", clip_g),
        "flux": save(folder / "flux.safetensors", models.tiny_flux_checkpoint(0)),
        "sdxl": sdxl_file,
    }


@pytest.mark.slow
def test_parts_from_files_of_their_own_make_the_same_model(files: dict[str, Path]) -> None:
    whole = load_model(files["whole"])
    parts = load_model(files["unet"], text_encoders=[files["clip_l"]], vae=files["vae"])
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1

    assert parts.files == {"denoiser": files["unet"], "text_encoder": files["clip_l"], "vae": files["vae"]}
    assert set(whole.files.values()) == {files["whole"]}
    assert torch.equal(parts.autoencoder.encode(pixels), whole.autoencoder.encode(pixels))
    texts = [one.text_encoder.encode("a (red:1.2) fox").tensors for one in (parts, whole)]
    assert all(torch.equal(texts[0][key], texts[1][key]) for key in ("context", "pooled"))
    for name, tensor in whole.components.denoiser.state_dict().items():
        assert torch.equal(tensor, parts.components.denoiser.state_dict()[name])


def test_a_part_may_come_from_a_checkpoint_that_holds_more(files: dict[str, Path]) -> None:
    model = load_model(files["unet"], text_encoders=[files["whole"]], vae=files["whole"])

    assert set(model.components.modules()) == {"denoiser", "text_encoder", "vae"}


@pytest.mark.slow
def test_a_part_may_come_from_a_diffusers_folder(files: dict[str, Path], tmp_path: Path) -> None:
    whole = load_model(files["whole"])
    whole.components.vae.save_pretrained(tmp_path / "vae")
    whole.components.text_encoders["text_encoder"].save_pretrained(tmp_path / "text_encoder")
    model = load_model(files["unet"], text_encoders=[tmp_path / "text_encoder"], vae=tmp_path / "vae")
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1

    assert torch.equal(model.autoencoder.encode(pixels), whole.autoencoder.encode(pixels))
    contexts = [one.text_encoder.encode("a fox").tensors["context"] for one in (model, whole)]
    assert torch.equal(*contexts)


REFUSED: dict[str, tuple[Callable[[dict[str, Path]], object], str]] = {
    "an encoder of another family": (
        lambda files: load_model(files["unet"], text_encoders=[files["clip_g"]]),
        r"clip_g\.safetensors is the text encoder clip_g, but Stable Diffusion 1\.x has clip_l \(usually "
        r"clip_l\.safetensors\); give one of these",
    ),
    "an autoencoder as encoder": (
        lambda files: load_model(files["unet"], text_encoders=[files["vae"]]),
        r"vae\.safetensors must hold a text encoder, but is an autoencoder of kind kl with 4 channels; give the file "
        r"clip_l\.safetensors",
    ),
    "a denoiser as autoencoder": (
        lambda files: load_model(files["unet"], vae=files["unet"]),
        r"unet\.safetensors must hold an autoencoder, but is a model of the family Stable Diffusion 1\.x; give",
    ),
    "an autoencoder of other channels": (
        lambda files: load_model(files["flux"], vae=files["vae"]),
        r"vae\.safetensors is an autoencoder of kind kl with 4 channels, but Flux\.1 has an autoencoder of kind kl "
        r"with 16 channels \(its file is usually called ae\.safetensors\)",
    ),
    "an encoder as model": (
        lambda files: load_model(files["clip_l"]),
        r"clip_l\.safetensors is the text encoder clip_l, not a denoiser; give it beside the model that it belongs to",
    ),
    "an autoencoder as model": (
        lambda files: load_model(files["vae"]),
        r"vae\.safetensors is an autoencoder of kind kl with 4 channels, not a denoiser; give it beside the model",
    ),
}


@pytest.mark.parametrize(("load", "message"), REFUSED.values(), ids=REFUSED)
def test_a_part_in_the_wrong_place_is_refused(
    load: Callable[[dict[str, Path]], object], message: str, files: dict[str, Path]
) -> None:
    with pytest.raises(ModelError, match=message):
        load(files)


def test_each_recogniser_takes_its_own_alone(files: dict[str, Path]) -> None:
    from lorasmith.families.files.checkpoint import OriginalCheckpoint

    opened = {name: OriginalCheckpoint(files[name]) for name in ("unet", "vae", "clip_l", "clip_g", "flux", "sdxl")}
    encoders = {
        name: [kind for kind, one in ENCODERS.items() if one.recognises(o.shapes)] for name, o in opened.items()
    }
    vaes = {
        name: [kind for kind, one in AUTOENCODERS.items() if one.recognises(o.shapes)] for name, o in opened.items()
    }
    families = {
        name: [key for key, one in FAMILIES.items() if one.recognises(o.denoiser_shapes)] for name, o in opened.items()
    }

    assert encoders == {"unet": [], "vae": [], "clip_l": ["clip_l"], "clip_g": ["clip_g"], "flux": [], "sdxl": []}
    assert vaes == {"unet": [], "vae": ["kl"], "clip_l": [], "clip_g": [], "flux": [], "sdxl": []}
    expected = {"unet": ["sd1"], "flux": ["flux1"], "sdxl": ["sdxl"]}
    assert families == {name: expected.get(name, []) for name in opened}


@pytest.mark.parametrize(
    ("width", "clip_type", "family"),
    [
        (2560, "lumina2", "z-image"),
        (2560, "flux2", "flux2-klein"),
        (4096, "lumina2", "flux2-klein"),
        (32, "lumina2", "z-image"),
        (32, "flux2", "flux2-klein"),
    ],
)
def test_the_width_of_a_released_encoder_counts_more_than_a_nodes_type(
    width: int, clip_type: str, family: str, tmp_path: Path
) -> None:
    file = save(tmp_path / "qwen3.safetensors", qwen3(width))
    assert load_text_encoder([file], clip_type).family.name == family


def qwen3(width: int) -> dict[str, Tensor]:
    """One layer of a Qwen3 that knows eight tokens."""
    sizes = {
        "embed_tokens": (8, width),
        "layers.0.self_attn.q_proj": (8, width),
        "layers.0.self_attn.k_proj": (8, width),
        "layers.0.self_attn.v_proj": (8, width),
        "layers.0.self_attn.o_proj": (width, 8),
        "layers.0.self_attn.q_norm": (8,),
        "layers.0.self_attn.k_norm": (8,),
        "layers.0.mlp.gate_proj": (8, width),
        "layers.0.mlp.up_proj": (8, width),
        "layers.0.mlp.down_proj": (width, 8),
        "layers.0.input_layernorm": (width,),
        "layers.0.post_attention_layernorm": (width,),
        "norm": (width,),
    }
    return {f"model.{name}.weight": torch.zeros(size) for name, size in sizes.items()}


def test_captions_of_different_length_share_a_batch(files: dict[str, Path]) -> None:
    model = load_model(files["whole"], dtype=torch.float32)
    family, denoiser = model.family, model.components.denoiser
    shapes = family.conditioning_shapes(denoiser)
    generator = torch.Generator().manual_seed(0)

    def caption(tokens: int) -> Conditioning:
        wanted = {**shapes, "context": (1, tokens, *shapes["context"][2:])}
        return Conditioning({key: torch.randn(shape, generator=generator) for key, shape in wanted.items()})

    captions = [caption(tokens) for tokens in (4, 12, 6)]
    latents = torch.randn(3, *model.components.latent.shape(64, 128), generator=generator)
    time = model.components.schedule.at(torch.tensor([0.2, 0.5, 0.9])).time
    with torch.no_grad():
        together = family.predict(denoiser, latents, time, family.join(captions))
        alone = [family.predict(denoiser, latents[i : i + 1], time[i : i + 1], one) for i, one in enumerate(captions)]

    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_weights_stay_in_the_file_until_they_are_placed(files: dict[str, Path], tmp_path: Path) -> None:
    half = {name: t.half() if t.is_floating_point() else t for name, t in load_file(files["whole"]).items()}
    model = load_model(save(tmp_path / "half.safetensors", half))
    parameters = [p for module in model.components.modules().values() for p in module.parameters()]

    assert {p.dtype for p in parameters} == {torch.float16}
    assert {
        p.dtype
        for p in load_model(tmp_path / "half.safetensors", dtype=torch.bfloat16).components.denoiser.parameters()
    } == {torch.bfloat16}
    with model.text_encoder.active(), model.autoencoder.active():
        assert {p.dtype for p in model.components.vae.parameters()} == {torch.float32}
    assert {p.dtype for module in model.components.modules().values() for p in module.parameters()} == {torch.float16}


@pytest.mark.parametrize("kind", slow_except([*packed_files.KINDS, "GGUF"], "int8 with ConvRot"))
@pytest.mark.parametrize("name", ["unet", "sdxl"])
@torch.no_grad()
def test_packed_unets_are_the_weights_they_stand_for(
    name: str, kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    prefix = UNET if name == "sdxl" else ""
    tensors = under(prefix, load_file(files[name]))
    file, meant = dict(tensors), dict(tensors)
    if kind == "GGUF":
        gguf = pytest.importorskip("gguf")
        meant = gguf_files.write(tmp_path / "packed", tensors, gguf.GGMLQuantizationType.Q8_0)
    else:
        for weight, tensor in tensors.items():
            if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
                packed, meant[weight] = packed_files.pack(kind, tensor)
                file |= {f"{weight.removesuffix('weight')}{leaf}": one.contiguous() for leaf, one in packed.items()}
        save(tmp_path / "packed", file)
    models_of = load_model(save(tmp_path / "plain", meant)), load_model(tmp_path / "packed")
    assert packed_layers(models_of[1].components.denoiser)
    predictions = []
    for model in models_of:
        shapes = model.family.conditioning_shapes(model.components.denoiser)
        prompt = Conditioning({key: models.seeded(key, shape, seed=0) for key, shape in shapes.items()})
        latents = models.seeded("latents", (1, *model.components.latent.shape(64, 64)), seed=0)
        with placed(model.components.denoiser, device=torch.device("cpu"), dtype=torch.float32):
            predictions.append(model.denoiser.predict(latents, torch.tensor([400.0]), prompt))
    torch.testing.assert_close(*predictions, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("vae", "encoder.down.0.block.99999999.x"),
        ("vae", "decoder.up.99999999.block.0.x"),
        ("vae", f"decoder.up.{'9' * 900}.block.0.x"),
        ("clip_l", f"text_model.encoder.layers.{'9' * 900}.x"),
        ("clip_l", "text_model.encoder.layers.99999999.x"),
    ],
)
def test_a_number_in_a_name_makes_no_model_of_that_many_blocks(
    part: str, name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    file = save(tmp_path / "x.safetensors", {**load_file(files[part]), name: torch.ones(1)})
    with pytest.raises(ModelError, match="does not fit its architecture"):
        load_autoencoder(file) if part == "vae" else load_text_encoder([file], "stable_diffusion")
