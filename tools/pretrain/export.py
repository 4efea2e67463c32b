"""The finished model as files: one checkpoint in the original layout, and the configurations that go with it.

The checkpoint is what the package ships. What its shapes leave open stands in its metadata; the folder of
configurations and tokenizer is for diffusers, `StableDiffusionPipeline.from_single_file(checkpoint, config=folder)`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from lorasmith.families.files.checkpoint import ARCHITECTURE
from lorasmith.families.parts.autoencoders import diffusers_vae
from lorasmith.families.parts.clip import clip_tokenizer
from lorasmith.families.stable_diffusion import StableDiffusion
from lorasmith.formats.container import write_safetensors

DEFAULTS = {"learning_rate": 7e-4, "targets": "all", "guidance": 3.0}


def pipeline(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> StableDiffusionPipeline:
    """diffusers' pipeline around the three networks."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(size=text_encoder.config.vocab_size),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipe: StableDiffusionPipeline, checkpoint: Path, configs: Path) -> None:
    """Write the checkpoint, in fp16, and the folder of configurations without weights."""
    architecture = {
        "unet": {key: pipe.unet.config[key] for key in ("attention_head_dim", "norm_num_groups", "sample_size")},
        "vae": {key: pipe.vae.config[key] for key in ("norm_num_groups", "sample_size")},
        "text_encoder": {"num_attention_heads": pipe.text_encoder.config.num_attention_heads},
        "defaults": DEFAULTS,
    }
    metadata = {
        ARCHITECTURE: json.dumps(architecture),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": checkpoint.stem,
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "v",
        "modelspec.license": "see NOTICE: Apache-2.0, MIT and CC-BY-4.0 drawings",
    }
    tensors = {name: tensor.to(torch.float16) for name, tensor in original_tensors(pipe).items()}
    write_safetensors(checkpoint, tensors, metadata)
    shutil.rmtree(configs, ignore_errors=True)
    pipe.save_pretrained(configs)
    for weights in configs.rglob("*.safetensors"):
        weights.unlink()
    for file in configs.glob("*/config.json"):
        config = json.loads(file.read_text("utf-8"))
        config.pop("_name_or_path", None)  # where the weights lay on this machine
        file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def original_tensors(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All weights under the names that Stable Diffusion 1.x's own checkpoints use."""
    names = StableDiffusion(1).names(pipe.unet, {"text_encoder": pipe.text_encoder})
    tensors: dict[str, Tensor] = {}
    for name, tensor in pipe.unet.state_dict().items():
        path, _, leaf = name.rpartition(".")
        tensors[f"model.diffusion_model.{names.denoiser[path].path}.{leaf}"] = tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    vae = _original_vae(pipe.vae.state_dict())
    assert diffusers_vae(vae).keys() == pipe.vae.state_dict().keys()
    return tensors | {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}


_VAE_NAMES = (
    (r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
)
_VAE_UP = re.compile(r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.")


def _original_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `diffusers_vae`; attention's matrices become 1×1 convolutions again."""
    levels = 1 + max(int(match[1]) for name in tensors if (match := _VAE_UP.match(name)))

    def up(match: re.Match[str]) -> str:
        inside = "upsample" if match[2] is None else f"block.{match[2]}"
        return f"decoder.up.{levels - 1 - int(match[1])}.{inside}."

    converted = {}
    for name, tensor in tensors.items():
        new = _VAE_UP.sub(up, name)
        for pattern, replacement in _VAE_NAMES:
            new = re.sub(pattern, replacement, new)
        attention = ".attn_1." in new and tensor.ndim == 2
        converted[new] = tensor[:, :, None, None] if attention else tensor
    return converted
