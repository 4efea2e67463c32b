"""Small models of random weights, and conditionings for them."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from small_models import FAMILIES


@dataclass(frozen=True)
class Conditioned:
    """A family with something in its conditionings, and what a model that takes it has of its own."""

    options: Callable[[torch.Generator], dict[str, Any]]
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def _references(*sizes: tuple[int, ...], **options: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {
        "reference_latents": [torch.randn(1, *size, generator=generator) for size in sizes],
        **options,
    }


def _concat(channels: int, *mask: int, frames: int = 0) -> Callable[[torch.Generator], dict[str, Any]]:
    size = (1, channels, *([frames] if frames else []), 16, 16)
    return lambda generator: {
        "concat_latent_image": torch.randn(size, generator=generator),
        "concat_mask": (torch.rand(mask, generator=generator) > 0.5).float(),
    }


def _start_image(generator: torch.Generator) -> dict[str, Any]:
    seen = types.SimpleNamespace(penultimate_hidden_states=torch.randn(1, 257, 1280, generator=generator))
    return {**_concat(16, 1, 1, 3, 16, 16, frames=3)(generator), "clip_vision_output": seen}


class _Encoder:
    """In place of a VAE: pixels averaged."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)


def _control(name: str, count: int = 1, vae: Any = None) -> Callable[[torch.Generator], dict[str, Any]]:
    def options(generator: torch.Generator) -> dict[str, Any]:
        import comfy.cldm.cldm
        import comfy.controlnet

        settings = {key: value for key, value in FAMILIES[name].settings.items() if key != "out_channels"}
        settings.pop("transformer_depth_output")
        control = None
        for number in range(count):
            network = comfy.cldm.cldm.ControlNet(**settings, hint_channels=3).requires_grad_(False).eval()
            with torch.no_grad():
                for parameter in network.parameters():
                    scale = 0.5 / max(parameter[0].numel(), 4) ** 0.5
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            now = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
            image = torch.rand(1, 3, 100, 120, generator=generator)
            now.set_cond_hint(image, 0.7 + 0.2 * number).set_previous_controlnet(control)
            now.vae = vae
            control = now
        return {"control": control}

    return options


class _Features(torch.nn.Module):
    """In place of the network of a T2I adapter, whose features are of larger UNets: a feature of the first block."""

    unshuffle_amount = 8

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.02 * torch.randn(320, 192, 1, 1, generator=generator), requires_grad=False)

    def forward(self, x: torch.Tensor) -> dict[str, list[Any]]:
        pixels = torch.nn.functional.pixel_unshuffle(x, self.unshuffle_amount)
        return {"input": [torch.nn.functional.conv2d(pixels, self.weight), None]}


def _adapter(generator: torch.Generator) -> dict[str, Any]:
    import comfy.controlnet

    adapter = comfy.controlnet.T2IAdapter(_Features(generator), 3, 8, "nearest-exact", torch.device("cpu"))
    return {"control": adapter.set_cond_hint(torch.rand(1, 3, 100, 120, generator=generator), 0.7)}


CONDITIONED: dict[str, dict[str, Conditioned]] = {
    "sd1": {
        "ControlNet": Conditioned(_control("sd1")),
        "two ControlNets": Conditioned(_control("sd1", 2)),
        "ControlNet with a VAE": Conditioned(_control("sd1", vae=_Encoder())),
        "T2I adapter": Conditioned(_adapter),
        "inpainting": Conditioned(_concat(4, 1, 1, 128, 128), settings={"in_channels": 9}),
    },
    "sdxl": {"ControlNet": Conditioned(_control("sdxl"))},
    "flux": {
        "a reference": Conditioned(_references((16, 16, 16))),
        "references": Conditioned(_references((16, 16, 12), (16, 8, 16))),
        "references by index": Conditioned(_references((16, 16, 16), (16, 8, 8), reference_latents_method="index")),
        "inpainting": Conditioned(_concat(16, 1, 1, 128, 128), "FluxInpaint", {"in_channels": 96}),
    },
    "flux2": {"references": Conditioned(_references((128, 16, 16), (128, 8, 12)))},
    "qwen-image": {"references": Conditioned(_references((16, 1, 16, 16), (16, 1, 8, 12)))},
    "krea2": {
        "references": Conditioned(_references((16, 1, 16, 16), (16, 1, 8, 12), reference_latents_method="index"))
    },
    "wan": {"start image": Conditioned(_start_image, "WAN21_I2V", {"model_type": "i2v", "in_dim": 36})},
}
"""What conditionings of a family may have besides a caption, by what it is."""


def model_of(name: str, dtype: torch.dtype = torch.float32, conditioned: str = "", **options: Any) -> Any:
    """A MODEL of ComfyUI's own classes."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    family, own = FAMILIES[name], CONDITIONED[name][conditioned] if conditioned else None
    settings = {**family.settings, **(own.settings if own else {})}
    config = getattr(comfy.supported_models, own.config if own and own.config else family.config)(dict(settings))
    config.unet_config |= settings  # also over what a class says of networks of the usual size
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    generator = torch.Generator().manual_seed(0)
    model = config.get_model(family.beside(generator), "", device=torch.device("cpu"))
    with torch.no_grad():
        for key, tensor in model.diffusion_model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                values *= 0.7 / tensor[0].numel() ** 0.5
            elif key.endswith(("weight", "scale")):
                values = 1 + 0.05 * values
            else:
                values *= 0.02
            tensor.copy_(values)
    device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.CoreModelPatcher(model, device, comfy.model_management.unet_offload_device())
    patcher.cached_patcher_init = (model_of, (name, dtype, conditioned))  # how ComfyUI copies it
    return patcher


_FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8")
QUANTIZED: dict[str, dict[str, Any]] = {
    **{name: {} for name in _FORMATS},
    "int8_tensorwise, rotated": {"convrot": True, "convrot_groupsize": 256},
    "nvfp4, smoothed": {},
}
"""ComfyUI's formats of quantized layers, with what is said of them in a file; `smoothed` layers scale their inputs."""

GGUF = ("Q8_0", "Q5_1", "Q4_0", "BF16")
"""Kinds of packed tensors that the package gguf can write."""


def quantized_of(name: str, kind: str) -> Any:
    """A MODEL as ComfyUI makes one of a file with quantized layers; `scaled_fp8` is an older form of file."""
    import comfy.quant_ops
    import comfy.utils

    plain = model_of(name).model.diffusion_model
    tensors = dict(plain.state_dict())
    if kind == "scaled_fp8":
        tensors["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    else:
        conf = {"format": kind.partition(",")[0], **QUANTIZED[kind]}
        layout = comfy.quant_ops.QUANT_ALGOS[conf["format"]]["comfy_tensor_layout"]
    for path, layer in plain.named_modules():
        if not isinstance(layer, torch.nn.Linear) or layer.in_features % (
            256 if "rot" in kind or "asym" in kind else 64
        ):
            continue
        key, weight = f"{path}.weight", layer.weight.detach()
        if kind == "scaled_fp8":
            scale = weight.abs().max() / 448
            tensors |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{path}.scale_weight": scale}
            continue
        if kind.endswith("smoothed"):
            factor = torch.rand(layer.in_features, generator=torch.Generator().manual_seed(len(path))) + 0.5
            weight, tensors[f"{path}.pre_quant_scale"] = weight / factor, factor
        how = {"scale": "recalculate"} if "8E" in layout or "NV" in layout else {}
        if "rotated" in kind:
            how |= {"per_channel": True, **QUANTIZED[kind]}
        packed = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **how)
        del tensors[key]
        tensors |= packed.state_dict(key)
        tensors[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    if kind == "scaled_fp8":
        tensors, _ = comfy.utils.convert_old_quants(tensors)
    return _of_tensors(name, tensors, quant_config={"mixed_ops": True})


def gguf_of(name: str, kind: str, theirs: Any) -> Any:
    """A MODEL as ComfyUI-GGUF, the package `theirs`, makes one of a file of a kind."""
    import gguf

    ops = theirs.ops
    plain = model_of(name).model.diffusion_model
    tensors, kinds = {}, gguf.GGMLQuantizationType
    linear = {f"{path}.weight" for path, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    for key, tensor in plain.state_dict().items():
        of = kinds[kind] if key in linear and tensor.shape[-1] % 256 == 0 else kinds.F32
        packed = torch.from_numpy(gguf.quants.quantize(tensor.float().numpy(), of))
        tensors[key] = ops.GGMLTensor(packed, tensor_type=of, tensor_shape=tensor.shape)
    return theirs.nodes.GGUFModelPatcher.clone(_of_tensors(name, tensors, custom_operations=ops.GGMLOps()))


def _of_tensors(name: str, tensors: dict[str, Any], **settings: Any) -> Any:
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.config)(dict(family.settings))
    config.set_inference_dtype(torch.float32, torch.float32)
    for setting, value in settings.items():
        setattr(config, setting, value)
    model = config.get_model({}, "", device=torch.device("cpu"))
    missing, unexpected = model.diffusion_model.load_state_dict(tensors, strict=False)
    assert not unexpected and not [key for key in missing if not key.endswith("weight")], (missing, unexpected)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, device, comfy.model_management.unet_offload_device())


def data_of(
    name: str, *, conditioned: str = "", count: int = 4, side: int = 16
) -> tuple[list[torch.Tensor], list[list[Any]]]:
    """Latents and a CONDITIONING of as many entries."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(12345)
    shape = (1, family.channels, *([family.frames] if family.frames else []), *family.size)
    latents = [torch.randn(shape, generator=generator) for _ in range(count)]
    positive = [
        [torch.randn(1, family.tokens, family.context, generator=generator), family.options(generator)]
        for _ in range(count)
    ]
    if conditioned:
        for _, entry in positive:
            entry |= CONDITIONED[name][conditioned].options(generator)
    return latents, positive
