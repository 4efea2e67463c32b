"""Load LoRAs with sd-scripts' own network code and compare what the denoiser answers.

    python tests/peers/sd_scripts_loads.py --sd-scripts PATH/TO/sd-scripts --checkpoint MODEL.safetensors \\
        LORA=REFERENCE ...

MODEL is a Stable Diffusion 1.x UNet of a shape that `models.py` lists, which runs in diffusers' UNet that sd-scripts'
network wraps, a Stable Diffusion XL UNet of any width, Flux.1, Chroma, Stable Diffusion 3, Lumina 2 or Anima, which run
in sd-scripts' own models. Layers of text encoders that a LoRA has something for are counted, and not run. The rest, and
what is printed, is described in `load_report.py`. Needs torch, diffusers and transformers, for the transformers einops,
for Anima torchvision.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import sd_scripts_headless
import torch
from load_report import Loaded, base_of, parser, run
from safetensors.torch import load_file
from text_encoders import behind_text_model, text_encoders
from torch import Tensor, nn


def main() -> None:
    arguments = parser(__doc__, "sd-scripts").parse_args()
    network = sd_scripts_headless.boot(arguments.sd_scripts)
    tensors = load_file(str(arguments.checkpoint))
    if "distilled_guidance_layer.in_proj.weight" in tensors:
        network, model, denoise = importlib.import_module("networks.lora_flux"), _chroma(tensors), _chroma_answer
        family = "chroma"
    elif "double_blocks.0.img_attn.qkv.weight" in tensors:
        network, model, denoise = importlib.import_module("networks.lora_flux"), _flux(tensors), _flux_answer
        family = "flux1"
    elif "llm_adapter.embed.weight" in tensors:
        network, model, denoise = importlib.import_module("networks.lora_anima"), _anima(tensors), _anima_answer
        family = "anima"
    elif "joint_blocks.0.context_block.attn.qkv.weight" in tensors:
        network, model, denoise = importlib.import_module("networks.lora_sd3"), _sd3(tensors), _sd3_answer
        family = "sd3"
    elif "noise_refiner.0.attention.k_norm.weight" in tensors:
        network, model, denoise = importlib.import_module("networks.lora_lumina"), _lumina(tensors), _lumina_answer
        family = "lumina2"
    elif "model.diffusion_model.label_emb.0.0.weight" in tensors:
        family, model, denoise = "sdxl", _sdxl(tensors), _sdxl_answer
    else:
        family, model, denoise = "sd1", _unet(arguments.checkpoint, tensors), _unet_answer
    run(arguments, lambda lora, inputs: _loaded(network, family, model, denoise, lora, inputs))


@torch.no_grad()
def _loaded(module: Any, family: str, model: nn.Module, denoise: Any, lora: Path, inputs: dict[str, Tensor]) -> Loaded:
    own = {layer: layer.__dict__.get("forward") for layer in model.modules()}
    without = denoise(model, **inputs)
    weights = load_file(str(lora))
    has_text = any(key.startswith("lora_te") for key in weights)
    encoder: Any = [nn.Module()] if family == "lumina2" else []  # its network asks for one
    if has_text:
        encoder = [behind_text_model(one) for one in text_encoders(family).values()]
        encoder = encoder if len(encoder) > 1 else encoder[0]  # several have numbers in their names
    network, _ = module.create_network_from_weights(1.0, None, None, encoder, model, weights_sd=weights)
    try:
        network.apply_to(encoder, model, apply_text_encoder=has_text, apply_unet=True)
        unexpected = set(network.load_state_dict(weights, strict=False).unexpected_keys)
        output = denoise(model, **inputs)
    finally:
        for layer, forward in own.items():
            if forward is None:
                layer.__dict__.pop("forward", None)
    return Loaded({base_of(key) for key in weights}, {base_of(key) for key in unexpected}, output, without)


def _unet(checkpoint: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """diffusers' UNet of the file, through diffusers' own conversion."""
    from diffusers import UNet2DConditionModel

    sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for shape in (models.SD1_TINY, models.SD1_FULL):
        if all(sizes.get(shape.prefix + name) == size for name, size in shape.tensors()):
            break
    else:
        sys.exit(
            f"{checkpoint} has none of the shapes in models.py; use models.SD1_TINY or a Stable Diffusion 1.x file"
        )
    with tempfile.TemporaryDirectory() as folder:
        UNet2DConditionModel.from_config(models.diffusers_config(shape)).save_config(folder)
        unet: nn.Module = UNet2DConditionModel.from_single_file(
            str(checkpoint), config=folder, local_files_only=True, torch_dtype=torch.float32
        )
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def _unet_answer(unet: nn.Module, *, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    output: Tensor = unet(x, timestep, context).sample
    return output


def _sdxl(tensors: dict[str, Tensor]) -> nn.Module:
    """sd-scripts' UNet of the width that the tensors have; the rest is fixed there."""
    from library import sdxl_original_unet as module

    prefix = models.UNetShape.prefix
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    module.MODEL_CHANNELS = own["input_blocks.0.0.weight"].shape[0]
    module.TIME_EMBED_DIM = 4 * module.MODEL_CHANNELS
    with torch.device("meta"):
        unet: nn.Module = module.SdxlUNet2DConditionModel()
    unet.load_state_dict(own, assign=True)
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def _sdxl_answer(
    unet: nn.Module, *, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, time_ids: Tensor
) -> Tensor:
    from library.sdxl_original_unet import get_timestep_embedding

    sizes = get_timestep_embedding(time_ids.flatten(), models.SIZE_WIDTH, downscale_freq_shift=0)
    output: Tensor = unet(x, timestep, context, torch.cat((pooled, sizes.reshape(len(x), -1)), dim=1))
    return output


def _flux(tensors: dict[str, Tensor]) -> nn.Module:
    """sd-scripts' Flux of the sizes that the tensors have."""
    from library.flux_models import Flux, FluxParams

    hidden, channels = tensors["img_in.weight"].shape
    head = tensors["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    with torch.device("meta"):
        model: nn.Module = Flux(
            FluxParams(
                in_channels=channels,
                vec_in_dim=tensors["vector_in.in_layer.weight"].shape[1],
                context_in_dim=tensors["txt_in.weight"].shape[1],
                hidden_size=hidden,
                mlp_ratio=4.0,
                num_heads=hidden // head,
                depth=_blocks(tensors, "double_blocks"),
                depth_single_blocks=_blocks(tensors, "single_blocks"),
                axes_dim=[head // 8, 7 * head // 16, 7 * head // 16],
                theta=10_000,
                qkv_bias=True,
                guidance_embed=True,
            )
        )
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _blocks(tensors: dict[str, Tensor], kind: str) -> int:
    return 1 + max(int(match[1]) for key in tensors if (match := re.match(rf"{kind}\.(\d+)\.", key)))


def _chroma(tensors: dict[str, Tensor]) -> nn.Module:
    """sd-scripts' Chroma of the sizes that the tensors have."""
    from library.chroma_models import Chroma, chroma_params

    head = tensors["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    hidden = tensors["img_in.weight"].shape[0]
    approximated = tensors["distilled_guidance_layer.in_proj.weight"].shape
    model: nn.Module = Chroma(
        replace(
            chroma_params,
            hidden_size=hidden,
            context_in_dim=tensors["txt_in.weight"].shape[1],
            num_heads=hidden // head,
            depth=_blocks(tensors, "double_blocks"),
            depth_single_blocks=_blocks(tensors, "single_blocks"),
            axes_dim=[head // 8, 7 * head // 16, 7 * head // 16],
            approximator_in_dim=approximated[1],
            approximator_hidden_size=approximated[0],
            approximator_depth=_blocks(tensors, r"distilled_guidance_layer\.layers"),
        )
    )
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _chroma_answer(chroma: nn.Module, *, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    ones = torch.ones(context.shape[:2])
    return _flux_answer(
        chroma, x=x, timestep=timestep, context=context, pooled=None, guidance=0 * timestep, txt_attention_mask=ones
    )


@torch.no_grad()
def _flux_answer(
    flux: nn.Module,
    *,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    pooled: Tensor | None,
    guidance: Tensor,
    **more: Tensor,
) -> Tensor:
    """Latents are packed 2×2 into tokens, each at its place (0, row, column)."""
    batch, channels, height, width = x.shape
    tokens = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(height // 2.0), torch.arange(width // 2.0))
    output = flux(
        img=tokens,
        img_ids=places.expand(batch, -1, -1),
        txt=context,
        txt_ids=torch.zeros(batch, context.shape[1], 3),
        timesteps=timestep,
        y=pooled,
        guidance=guidance,
        **more,
    )
    answer: Tensor = (
        output.unflatten(1, (height // 2, width // 2)).unflatten(3, (channels, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    )
    return answer.reshape(x.shape)


def _anima(tensors: dict[str, Tensor]) -> nn.Module:
    """sd-scripts' Anima of the sizes that the tensors have."""
    from library.anima_models import Anima, LLMAdapter

    width, patch = tensors["x_embedder.proj.1.weight"].shape
    head = tensors["blocks.0.self_attn.q_norm.weight"].shape[0]
    model: nn.Module = Anima(
        max_img_h=512,
        max_img_w=512,
        max_frames=128,
        in_channels=patch // 4 - 1,
        out_channels=tensors["final_layer.linear.weight"].shape[0] // 4,
        patch_spatial=2,
        patch_temporal=1,
        model_channels=width,
        num_blocks=1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
        num_heads=width // head,
        crossattn_emb_channels=tensors["blocks.0.cross_attn.k_proj.weight"].shape[1],
        pos_emb_cls="rope3d",
        use_adaln_lora=True,
        adaln_lora_dim=tensors["blocks.0.adaln_modulation_self_attn.1.weight"].shape[0],
        rope_h_extrapolation_ratio=4.0,
        rope_w_extrapolation_ratio=4.0,
    )
    vocabulary, target = tensors["llm_adapter.embed.weight"].shape
    inner, source = tensors["llm_adapter.blocks.0.cross_attn.k_proj.weight"].shape
    model.llm_adapter = LLMAdapter(
        source,
        target,
        inner,
        num_layers=1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("llm_adapter.blocks.")),
        num_heads=inner // tensors["llm_adapter.blocks.0.cross_attn.q_norm.weight"].shape[0],
        embed=nn.Embedding(vocabulary, target),
        self_attn=True,
    )
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and not [name for name in missing if not name.startswith("pos_embedder.")]
    return model.eval().requires_grad_(False)


def _sd3(tensors: dict[str, Tensor]) -> nn.Module:
    """sd-scripts' Stable Diffusion 3 of the sizes that the tensors have."""
    from library import sd3_utils

    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    model: nn.Module = sd3_utils.load_mmdit(whole, torch.float32, "cpu")
    for block in model.joint_blocks:
        if block.x_block.x_block_self_attn:  # sd-scripts takes the number of heads for their width there
            block.x_block.attn2.num_heads = block.x_block.attn2.head_dim
    return model.eval().requires_grad_(False)


def _lumina(tensors: dict[str, Tensor]) -> nn.Module:
    """sd-scripts' Lumina 2 of the sizes that the tensors have."""
    from library.lumina_models import NextDiT

    width, text = tensors["cap_embedder.1.weight"].shape
    head = tensors["layers.0.attention.q_norm.weight"].shape[0]
    model: nn.Module = NextDiT(
        in_channels=tensors["x_embedder.weight"].shape[1] // 4,
        dim=width,
        n_layers=_blocks(tensors, "layers"),
        n_refiner_layers=_blocks(tensors, "noise_refiner"),
        n_heads=width // head,
        n_kv_heads=(tensors["layers.0.attention.qkv.weight"].shape[0] - width) // 2 // head,
        multiple_of=math.gcd(tensors["layers.0.feed_forward.w1.weight"].shape[0], 256),
        qk_norm=True,
        cap_feat_dim=text,
        axes_dims=[head // 3] * 3,
        axes_lens=[300, 512, 512],
    )
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _lumina_answer(model: nn.Module, *, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """Its time is 1 at the picture, to which its prediction points."""
    output: Tensor = model(x, 1 - timestep, context, torch.ones(context.shape[:2], dtype=torch.long))
    return -output


@torch.no_grad()
def _anima_answer(
    model: nn.Module, *, x: Tensor, timestep: Tensor, context: Tensor, t5xxl_ids: Tensor, t5xxl_weights: Tensor
) -> Tensor:
    """sd-scripts has no weights of words; they multiply the adapter's rows."""
    rows = model.llm_adapter(context, t5xxl_ids) * t5xxl_weights.unsqueeze(-1)  # type: ignore[operator]
    rows = nn.functional.pad(rows, (0, 0, 0, 512 - rows.shape[1]))
    output: Tensor = model(x, timestep, rows, padding_mask=torch.zeros(len(x), 1, *x.shape[-2:]))
    return output


@torch.no_grad()
def _sd3_answer(mmdit: nn.Module, *, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    output: Tensor = mmdit(x, timestep, context=context, y=pooled)
    return output


if __name__ == "__main__":
    main()
