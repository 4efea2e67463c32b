"""Load LoRAs with the libraries that install beside this project, and compare what the denoiser answers.

    ours        `Lora.load`
    diffusers   `load_lora_weights` of the family's pipeline
    PEFT        `inject_adapter_in_model` and `set_peft_model_state_dict` with a PEFT folder
    LyCORIS     its network for kohya's files, on diffusers' UNet or, for models whose kohya files have the original
                names, on bare layers under these names; merged into the weights, which our model then runs with

Each takes a LoRA and gives a `load_report.Loaded`. Modules are counted in the model: layers that a loader has given an
adapter that is not zero.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from load_report import Loaded, base_of
from lora_cases import answer, clip_l
from safetensors.torch import load_file
from torch import Tensor, nn

from lorasmith.core.adapter_state import DENOISER
from lorasmith.families.files.original_weights import from_original_tensors
from lorasmith.families.model import Model
from lorasmith.training.lora_handle import Lora

__all__ = ["LOADERS", "Inputs"]

Inputs = Mapping[str, Tensor]


def ours(model: Model, path: Path, given: Inputs, wanted: set[str]) -> Loaded:
    lora = Lora.load(path, model)
    found = {f"{ref.component}.{ref.path}" for ref in (*lora.state.adapters, *lora.state.differences)}
    return Loaded(wanted, wanted - found, answer(model, given, lora), answer(model, given))


def with_diffusers(model: Model, path: Path, given: Inputs, wanted: set[str]) -> Loaded:
    without = answer(model, given)
    denoiser = copy.deepcopy(model.components.denoiser)
    encoder = _encoder(wanted)
    pipeline = _pipeline(denoiser, encoder)
    if path.is_dir():
        pipeline.load_lora_weights(str(path), weight_name="adapter_model.safetensors")
    else:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    found = _adapted(DENOISER, denoiser) | _adapted("text_encoder", encoder)
    return Loaded(wanted, wanted - found, _answer_of(model, denoiser, given), without)


def with_peft(model: Model, path: Path, given: Inputs, wanted: set[str]) -> Loaded:
    without = answer(model, given)
    denoiser = copy.deepcopy(model.components.denoiser)
    _inject(denoiser, path)
    found = _adapted(DENOISER, denoiser)
    if (path / "text_encoder").is_dir():
        encoder = _encoder(wanted)
        assert encoder is not None
        _inject(encoder, path / "text_encoder")
        found |= _adapted("text_encoder", encoder)
    return Loaded(wanted, wanted - found, _answer_of(model, denoiser, given), without)


def with_lycoris(model: Model, path: Path, given: Inputs, wanted: set[str]) -> Loaded:
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

    # LyCORIS 4.1.3 lists the layers of the time embedding by class and by name, and stops when it meets them twice.
    LycorisNetworkKohya.apply_preset({"unet_target_name": []})
    without = answer(model, given)
    weights = load_file(str(path))
    denoiser = copy.deepcopy(model.components.denoiser)
    by_original = model.names.kohya_naming == "original"
    layers = _original_layers(model, path) if by_original else denoiser
    encoder = clip_l() if any(key.startswith("lora_te") for key in weights) else None
    network, _ = create_network_from_weights(1.0, None, None, encoder, layers, weights_sd=weights)
    applied = {module.lora_name for module in (*network.unet_loras, *network.text_encoder_loras)}
    network.merge_to(encoder, layers, weights, torch.float32, "cpu")
    if by_original:
        original = {name: parameter.data for name, parameter in layers.named_parameters()}
        denoiser.load_state_dict(from_original_tensors(denoiser, model.names.denoiser, original), assign=True)
    named = {base_of(key) for key in weights}
    return Loaded(named, named - applied, _answer_of(model, denoiser, given), without)


LOADERS: Mapping[str, Callable[[Model, Path, Inputs, set[str]], Loaded]] = {
    "ours": ours,
    "diffusers": with_diffusers,
    "PEFT": with_peft,
    "LyCORIS": with_lycoris,
}


def _encoder(wanted: set[str]) -> Any:
    """A text encoder where the LoRA has something for it, else None."""
    if not any(one.startswith("text_encoder.") for one in wanted):
        return None
    encoder = clip_l()
    return encoder if hasattr(encoder, "config") else encoder.text_model


def _inject(module: nn.Module, folder: Path) -> None:
    from peft import PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict

    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), module)
    result = set_peft_model_state_dict(module, load_peft_weights(str(folder), "cpu"))
    if result.unexpected_keys:
        raise ValueError(f"unexpected {result.unexpected_keys[0]}")


def _pipeline(denoiser: nn.Module, encoder: nn.Module | None) -> Any:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusionPipeline

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if type(denoiser).__name__ == "FluxTransformer2DModel":
        parts = dict.fromkeys(("vae", "text_encoder_2", "tokenizer", "tokenizer_2"))
        return FluxPipeline(
            **parts, text_encoder=encoder, transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler()
        )
    parts = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        **parts, text_encoder=encoder, unet=denoiser, scheduler=scheduler, requires_safety_checker=False
    )


def _adapted(component: str, module: nn.Module | None) -> set[str]:
    """The layers that PEFT has given a change, as `component.path`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    start = "text_model." if component != DENOISER and not hasattr(module, "text_model") else ""
    return {
        f"{component}.{start}{path}"
        for path, layer in (module or nn.Module()).named_modules()
        if isinstance(layer, BaseTunerLayer) and layer.get_delta_weight(layer.active_adapters[0]).any()
    }


def _answer_of(model: Model, denoiser: nn.Module, given: Inputs) -> Tensor:
    """The answer of another denoiser of the same family."""
    return answer(replace(model, components=replace(model.components, denoiser=denoiser.eval())), given)


def _original_layers(model: Model, path: Path) -> nn.Module:
    """The checkpoint's layers as a tree of modules under its own names, without a forward of their own."""
    assert model.path is not None
    root = nn.Module()
    tensors = load_file(str(model.path))
    for name in tensors:
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias":
            continue
        here = root
        *parents, last = owner.split(".")
        for parent in parents:
            if not hasattr(here, parent):
                here.add_module(parent, nn.Module())
            here = getattr(here, parent)
        weight = tensors[name]
        if weight.ndim == 2:
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            layer.bias = nn.Parameter(tensors[f"{owner}.bias"], requires_grad=False)
            layer.weight = nn.Parameter(weight, requires_grad=False)
        else:
            layer = nn.Module()
            layer.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
        here.add_module(last, layer)
    return root
