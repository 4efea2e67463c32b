"""Base models from files, folders and hubs, and one sentence for each way in which that fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from original_models import SMALLEST, save
from safetensors.torch import load_file, save_file
from transformer_models import TINY

from lorasmith.core.errors import ModelError
from lorasmith.families import locating
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN, built_in_models
from lorasmith.families.parts.clip import clip_tokenizer

TENSORS = SMALLEST.unet_tensors()


def said(source: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(source)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "base.safetensors", TENSORS)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 1 as diffusers saves it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("diffusers")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=64,
        attention_head_dim=2,
        sample_size=16,
    )
    encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    )
    unet.save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.5).save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    write(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write(
        folder / "scheduler" / "scheduler_config.json",
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    )
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Iterator[Path]:
    copy = tmp_path / "model"
    shutil.copytree(pristine, copy)
    yield copy
    shutil.rmtree(copy)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, or remove them where the value is None."""
    content = json.loads(path.read_text()) | values
    write(path, {key: value for key, value in content.items() if value is not None})


def test_a_diffusers_folder_is_loaded(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    components = model.components

    assert (model.family.name, model.title, model.path) == ("sd1", "model", folder)
    assert components.parameterization == "v"
    assert components.latent.scale == 0.5
    assert (components.latent.downscale, model.defaults.resolution, model.defaults.pixel_multiple) == (1, 16, 1)
    assert {p.dtype for p in components.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in components.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in components.text_encoders["text_encoder"].parameters()} == {torch.float32}
    for module in (components.denoiser, components.vae, *components.text_encoders.values()):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(components.denoiser.conv_in.weight, stored["conv_in.weight"].bfloat16())
    assert model.text_encoder.encode("a fox").tensors["context"].shape == (1, 77, 64)


def test_settings_of_its_own_override_the_familys(folder: Path) -> None:
    write(folder / "lorasmith.json", {"resolution": 48, "targets": "attention"})
    defaults = load_model(folder).defaults

    assert (defaults.resolution, defaults.targets, defaults.guidance) == (48, "attention", 7.5)


def test_an_old_scheduler_that_does_not_say_predicts_noise(folder: Path) -> None:
    change(folder / "scheduler" / "scheduler_config.json", prediction_type=None)

    assert load_model(folder).components.parameterization == "epsilon"


def test_a_schedulers_own_betas_count(folder: Path) -> None:
    from diffusers import DDPMScheduler

    change(folder / "scheduler" / "scheduler_config.json", beta_start=0.001, beta_end=0.02)
    reference = DDPMScheduler(beta_start=0.001, beta_end=0.02, beta_schedule="scaled_linear").alphas_cumprod
    sigmas = load_model(folder).components.schedule.sigmas

    torch.testing.assert_close(sigmas, ((1 - reference) / reference).sqrt(), rtol=1e-3, atol=0)


def test_a_scheduler_may_end_in_pure_noise(folder: Path) -> None:
    change(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    level = load_model(folder).components.schedule.at(torch.tensor([0.9999]))

    assert (level.alpha.item(), level.sigma.item()) == (0.0, 1.0)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_folder_may_lack_a_part_until_it_is_needed(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    model = load_model(folder)

    assert part not in model.files
    with pytest.raises(ModelError, match="this model came without"):
        model.family.check_parts(model.components, text=True, images=True)


def test_a_context_of_1024_is_version_2(folder: Path) -> None:
    change(folder / "unet" / "config.json", cross_attention_dim=1024)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    wide = {name: t.repeat(1, 16) for name, t in tensors.items() if ".attn2.to_k." in name or ".attn2.to_v." in name}
    save_file(tensors | wide, weights)

    assert load_model(folder).family.name == "sd2"


def damage(part: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-10])

    return cut


def replace_by_pickle(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


def without(weights: Path, name: str) -> None:
    save_file({key: t for key, t in load_file(weights).items() if not key.endswith(name)}, weights, {"format": "pt"})


def widen(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}, weights)


SCHEDULER = Path("scheduler", "scheduler_config.json")
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (
        lambda f: (f / "model_index.json").unlink(),
        "{} is not a diffusers model (it has no model_index.json);",
    ),
    "broken index": (
        lambda f: (f / "model_index.json").write_text("{"),
        "{}/model_index.json is not valid JSON; get the model again",
    ),
    "another pipeline": (
        lambda f: change(f / "model_index.json", _class_name="HunyuanDiTPipeline"),
        "{} is a diffusers model of an unsupported architecture; lorasmith models --known ",
    ),
    "no unet config": (
        lambda f: (f / "unet" / "config.json").unlink(),
        "{}/unet/config.json cannot be read (No such file or directory)",
    ),
    **{
        f"no {part}": (
            lambda f, part=part: shutil.rmtree(f / part),
            f"{{}} must hold a folder {part} but does not; it is incomplete, so get it again",
        )
        for part in ("tokenizer", "scheduler")
    },
    "an empty scheduler": (
        lambda f: (f / SCHEDULER).unlink(),
        "{}/scheduler/scheduler_config.json cannot be read (",
    ),
    "a tensor less in the unet": (
        lambda f: without(f / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.bias"),
        "{}/unet lacks conv_in.bias; it is incomplete, so get it again",
    ),
    "a tensor less in the vae": (
        lambda f: without(f / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        "{}/vae lacks decoder.conv_in.bias; it is incomplete",
    ),
    "a tensor less in the text encoder": (
        lambda f: without(f / "text_encoder" / "model.safetensors", "final_layer_norm.bias"),
        "{}/text_encoder lacks ",
    ),
    "unet cut short": (damage("unet"), "{}/unet/diffusion_pytorch_model.safetensors is cut short: "),
    "text encoder cut short": (damage("text_encoder"), "{}/text_encoder/model.safetensors is cut short: "),
    "pickled weights": (
        replace_by_pickle,
        "{}/unet must hold its weights as safetensors and does not;",
    ),
    "weights of another shape": (widen, "{}/unet does not fit its architecture: "),
    "another schedule": (
        lambda f: change(f / SCHEDULER, beta_schedule="linear"),
        "beta_schedule in the scheduler_config.json of model must be 'scaled_linear' as in Stable Diffusion 1.x's "
        "releases, got 'linear'; other noise schedules are not supported",
    ),
    "a schedule that does not say": (
        lambda f: change(f / SCHEDULER, beta_schedule=None),
        "beta_schedule in the scheduler_config.json of model must be 'scaled_linear'",
    ),
    "another prediction": (
        lambda f: change(f / SCHEDULER, prediction_type="sample"),
        "prediction_type in the scheduler_config.json of model must be epsilon or v_prediction, got 'sample';",
    ),
}


@pytest.mark.parametrize(("break_it", "sentence"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_be_loaded_is_a_sentence(
    folder: Path, break_it: Callable[[Path], Any], sentence: str
) -> None:
    break_it(folder)

    assert said(folder).startswith(sentence.format(folder))


def test_a_truncated_file_is_a_sentence(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])

    assert said(checkpoint).startswith(f"{checkpoint} is cut short: its header announces ")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_a_pickled_file_is_refused_whatever_it_is_called(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"base{suffix}"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)

    assert "pickle" in said(path)


@pytest.mark.parametrize("name", ["none.safetensors", "none.ckpt", "folder/none.SAFETENSORS"])
def test_a_missing_file_is_a_sentence(tmp_path: Path, name: str) -> None:
    assert said(tmp_path / name) == f"{tmp_path / name} does not exist; check the spelling and the folder"


def test_a_name_of_nothing_is_a_sentence() -> None:
    for name in ["lorasmith-tinny", "sd15", "a/b/c"]:
        assert said(name) == (
            f"there is no model at {name}; give a .safetensors checkpoint, a diffusers folder, "
            f"a hub id such as owner/name, or {BUILT_IN} for a first try"
        )


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-2-1"])
def test_hub_names_may_have_dots(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locating, "_downloaded", lambda repository: {name: folder}[repository])

    assert load_model(name).title == name


def test_a_hub_that_cannot_be_reached_is_a_sentence(network_attempts: list[str]) -> None:
    for name in ["owner/name.v2", "owner/not a name", "-/x"]:
        sentence = said(name)
        network_attempts.clear()  # which a hub id asks for

        assert sentence.startswith(f"the model {name} could not be downloaded (")
        assert sentence.endswith("); check the name and the network, or give a file that is already on this computer")


LORAS = {
    "kohya": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "comfyui": "diffusion_model.input_blocks.1.1.proj_in.lora_up.weight",
    "peft": "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight",
    "old diffusers": "down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight",
    "loha": "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a",
    "lokr": "diffusion_model.input_blocks.1.1.proj_in.lokr_w1",
    "oft": "diffusion_model.input_blocks.1.1.proj_in.oft_blocks",
}


@pytest.mark.parametrize("key", LORAS.values(), ids=LORAS)
def test_a_lora_is_no_base_model(tmp_path: Path, key: str) -> None:
    path = save(tmp_path / "dog.safetensors", {key: torch.zeros(2, 2)})

    assert said(path) == "dog.safetensors is a LoRA, not a base model; give it as the LoRA and choose a model"


def test_a_lora_with_some_of_its_models_tensors_is_no_base_model(tmp_path: Path) -> None:
    tensors = {
        "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(128),
        "img_in.lora_A.weight": torch.zeros(2, 2),
    }
    assert "is a LoRA, not a base model" in said(save(tmp_path / "control.safetensors", tensors))


TO_K = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
CONV_IN = "input_blocks.0.0.weight"
WAN_IN = "patch_embedding.weight"
KNOWN_BY_NAME: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "refiner": ({CONV_IN: (8, 4, 3, 3), TO_K: (8, 1280)}, "the Stable Diffusion XL refiner"),
    "inpainting": ({CONV_IN: (8, 9, 3, 3), TO_K: (8, 768)}, "an inpainting model"),
    "pix2pix": ({CONV_IN: (8, 8, 3, 3), TO_K: (8, 768)}, "an InstructPix2Pix model"),
    "radiance": (
        {"nerf_blocks.0.norm.scale": (4,), "distilled_guidance_layer.norms.0.scale": (4,)},
        "Chroma Radiance",
    ),
    "lumina": ({"cap_embedder.1.weight": (4, 4)}, "Lumina"),
    "wan": ({"head.modulation": (1, 2, 4)}, "a variant of Wan"),
    "framepack": (
        {"clean_x_embedder.proj.weight": (4, 4), "transformer_blocks.0.attn.to_q.weight": (4, 4)},
        "FramePack",
    ),
    "ltx 2": ({"audio_patchify_proj.weight": (4, 4), "patchify_proj.weight": (4, 4)}, "LTX-2"),
    "ltx": ({"patchify_proj.weight": (4, 4), "transformer_blocks.0.attn1.to_q.weight": (4, 4)}, "LTX-Video"),
    "kandinsky": ({"visual_transformer_blocks.0.self_attention.to_key.weight": (4, 4)}, "Kandinsky 5"),
    "part": ({"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)}, "one part of a diffusers model (give the folder"),
}
NOT_IN_COMFYUI = ("lumina", "framepack", "ltx 2", "part")


@pytest.mark.parametrize("name", KNOWN_BY_NAME)
def test_known_but_unsupported_models_are_called_by_name_and_sent_to_where_they_are_trained(
    tmp_path: Path, name: str
) -> None:
    shapes, title = KNOWN_BY_NAME[name]
    path = save(tmp_path / "m.safetensors", {name: torch.zeros(shape) for name, shape in shapes.items()})
    sentence = said(path)

    assert sentence.startswith(f"m.safetensors looks like {title}")
    remedy = "lorasmith models --known" if name in NOT_IN_COMFYUI else "train it in ComfyUI with Train LoRA (Lorasmith)"
    assert f", which is not supported; {remedy} " in sentence


VARIANTS: list[tuple[str, dict[str, tuple[int, ...]], str]] = [
    ("flux1", {"img_in.weight": (64, 128)}, "this Flux.1 variant takes 128 input channels (depth and canny do"),
    ("flux1", {"img_in.weight": (64, 256)}, "this Flux.1 variant takes 256 input channels (depth and canny do"),
    ("sd3", {"x_embedder.proj.weight": (128, 33, 2, 2)}, "this Stable Diffusion 3 variant takes 33 input channels"),
    ("chroma", {"img_in.weight": (64, 128)}, "this Chroma variant takes 128 input channels, but only text-to-image"),
    (
        "chroma",
        {"img_in.weight": (), "img_in.bias": (), "nerf_blocks.0.norm.scale": (4,)},
        "looks like Chroma Radiance, which",
    ),
    ("qwen-image", {"time_text_embed.addition_t_embedding.weight": (2, 64)}, "this model is Qwen-Image-Layered, which"),
    ("qwen-image", {"img_in.weight": (64, 132)}, "this model is a variant with 132 input channels, but only text-to-i"),
    ("wan", {WAN_IN: (128, 36, 1, 2, 2), "control_adapter.conv.weight": (8,)}, "one is camera control and takes 36"),
    ("wan", {"vace_patch_embedding.weight": (128, 96, 1, 2, 2)}, "one is VACE and takes 16"),
    ("wan", {WAN_IN: (128, 48, 1, 2, 2)}, "one is Fun control and takes 48"),
    (
        "wan",
        {WAN_IN: (128, 36, 1, 2, 2), "face_adapter.fuser_blocks.0.k_norm.weight": (128,)},
        "one is Animate and takes 36",
    ),
    ("wan", {WAN_IN: (128, 17, 1, 2, 2)}, "one is an unknown variant and takes 17"),
    (
        "hunyuan-video15",
        {"img_in.proj.weight": (128, 98, 1, 1, 1)},
        "one is an upsampler, which takes 98 channels; choose",
    ),
    ("hunyuan-video15", {"time_r_in.mlp.0.weight": (128, 256)}, "one is distilled to few steps by MeanFlow; choose"),
    (
        "hunyuan-video15",
        {"cond_type_embedding.weight": ()},
        "looks like HunyuanVideo 1.0 or HunyuanImage 2.1, which is not",
    ),
]
"""Family, shapes that other models of it have, () for a tensor that they lack, and what is said of them."""


def test_variants_of_families_are_refused_by_name(tmp_path: Path) -> None:
    files = {family: TINY[family].saved(tmp_path)["transformer"] for family in {one for one, *_ in VARIANTS}}
    for family, shapes, sentence in VARIANTS:
        tensors = load_file(files[family]) | {name: torch.zeros(shape) for name, shape in shapes.items()}
        path = save(tmp_path / "variant.safetensors", {name: one for name, one in tensors.items() if one.ndim})
        with pytest.raises(ModelError, match=re.escape(sentence)):
            load_model(path)


def test_an_unknown_architecture_shows_what_is_in_it(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", {name: torch.zeros(1) for name in ("layer.b", "layer.a", "z", "y")})

    assert said(path).startswith(
        "m.safetensors is of no supported architecture (its first tensors are layer.a, layer.b, y); lorasmith models "
    )


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"<!DOCTYPE html><html>not found</html>"])
def test_other_files_are_sentences(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)

    assert said(path).startswith(str(path))


def test_the_built_in_model_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert BUILT_IN in built_in_models()
    assert load_model(BUILT_IN).title == BUILT_IN
