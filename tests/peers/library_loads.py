"""Load LoRAs with the libraries that install beside this project, and compare what the denoiser answers.

    ours        `Lora.load`
    diffusers   `load_lora_weights` of the family's pipeline, or `load_lora_adapter` of the transformer of one without
    PEFT        `inject_adapter_in_model` and `set_peft_model_state_dict` with a PEFT folder
    LyCORIS     its network for kohya's files, on diffusers' UNet or, for models whose kohya files have the original
                names, on bare layers under these names; merged into the weights, which our model then runs with

Each takes a LoRA and gives a `load_report.Loaded`. Modules are counted in the model: layers that a loader has given an
adapter that is not zero.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from load_report import Loaded, base_of
from lora_cases import answer
from safetensors.torch import load_file
from text_encoders import behind_text_model, text_encoders
from torch import Tensor, nn

from lorasmith.core.adapter_state import DENOISER
from lorasmith.families.files.original_weights import from_original_tensors
from lorasmith.families.model import Model
from lorasmith.formats.names import matches
from lorasmith.training.lora_handle import Lora

Inputs = Mapping[str, Tensor]


def ours(model: Model, path: Path, given: Inputs, wanted: set[str]) -> Loaded:
    lora = Lora.load(path, model)
    found = {f"{ref.component}.{ref.path}" for ref in (*lora.state.adapters, *lora.state.differences)}
    return Loaded(wanted, wanted - found, answer(model, given, lora), answer(model, given))


def with_diffusers(model: Model, path: Path, given: Inputs, wanted: set[str]) -> Loaded:
    import diffusers

    without = answer(model, given)
    denoiser = copy.deepcopy(model.components.denoiser)
    encoders = _encoders(model, wanted)
    if not hasattr(getattr(diffusers, model.family.pipeline), "load_lora_weights"):
        denoiser.load_lora_adapter(load_file(str(path)))
    elif path.is_dir():
        pipeline = _pipeline(model, denoiser, encoders)
        pipeline.load_lora_weights(str(path), weight_name="adapter_model.safetensors")
    else:
        pipeline = _pipeline(model, denoiser, encoders)
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    found = _adapted(DENOISER, denoiser).union(*(_adapted(name, encoder) for name, encoder in encoders.items()))
    return Loaded(wanted, wanted - found, _answer_of(model, denoiser, given), without)


def with_peft(model: Model, path: Path, given: Inputs, wanted: set[str]) -> Loaded:
    without = answer(model, given)
    denoiser = copy.deepcopy(model.components.denoiser)
    _inject(denoiser, path)
    found = _adapted(DENOISER, denoiser)
    for component, encoder in _encoders(model, wanted).items():
        if (path / component).is_dir():
            _inject(encoder, path / component)
            found |= _adapted(component, encoder)
    return Loaded(wanted, wanted - found, _answer_of(model, denoiser, given), without)


def with_lycoris(model: Model, path: Path, given: Inputs, wanted: set[str]) -> Loaded:
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

    # LyCORIS 4.1.3 lists the layers of the time embedding by class and by name, and stops when it meets them twice.
    LycorisNetworkKohya.apply_preset({"unet_target_name": []})
    without = answer(model, given)
    weights = load_file(str(path))
    denoiser = copy.deepcopy(model.components.denoiser)
    by_original = model.names.kohya_naming == "original"
    layers = _original_layers(model) if by_original else denoiser
    named_encoders = any(key.startswith("lora_te") for key in weights)
    encoders = [behind_text_model(one) for one in text_encoders(model.family.name).values()] if named_encoders else []
    encoder = encoders if len(encoders) > 1 else next(iter(encoders), None)  # several have numbers in their names
    network, _ = create_network_from_weights(1.0, None, None, encoder, layers, weights_sd=weights)
    applied = {module.lora_name for module in (*network.unet_loras, *network.text_encoder_loras)}
    network.merge_to(encoder, layers, weights, torch.float32, "cpu")
    if by_original:
        unused = model.family.unused_tensors
        original = {name: one.data for name, one in layers.named_parameters() if not matches(name, unused)}
        denoiser.load_state_dict(from_original_tensors(denoiser, model.names.denoiser, original), assign=True)
    named = {base_of(key) for key in weights}
    return Loaded(named, named - applied, _answer_of(model, denoiser, given), without)


LOADERS: Mapping[str, Callable[[Model, Path, Inputs, set[str]], Loaded]] = {
    "ours": ours,
    "diffusers": with_diffusers,
    "PEFT": with_peft,
    "LyCORIS": with_lycoris,
}


def _encoders(model: Model, wanted: set[str]) -> dict[str, nn.Module]:
    """The text encoders by component where the LoRA has something for them."""
    return text_encoders(model.family.name) if any(one.startswith("text_encoder") for one in wanted) else {}


def _inject(module: nn.Module, folder: Path) -> None:
    from peft import PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict

    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), module)
    result = set_peft_model_state_dict(module, load_peft_weights(str(folder), "cpu"))
    if result.unexpected_keys:
        raise ValueError(f"unexpected {result.unexpected_keys[0]}")


def _pipeline(model: Model, denoiser: nn.Module, encoders: Mapping[str, nn.Module]) -> Any:
    """diffusers' pipeline of the family, of which the denoiser and some text encoders are there."""
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    kind = getattr(diffusers, model.family.pipeline)
    if issubclass(kind, diffusers.ModularPipeline):
        pipeline = kind()
        further = {name: getattr(denoiser, name) for name in model.family.denoiser_parts}
        pipeline.update_components(**{model.family.denoiser_folder: denoiser, **further})
        return pipeline
    needed = [name for name, one in inspect.signature(kind.__init__).parameters.items() if one.default is one.empty]
    parts: dict[str, Any] = {**dict.fromkeys(needed[1:]), **encoders, model.family.denoiser_folder: denoiser}
    if model.components.parameterization == "flow":
        return kind(**{**parts, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()})
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    extra = {"requires_safety_checker": False} if model.family.name == "sd1" else {"add_watermarker": False}
    return kind(**{**parts, "scheduler": scheduler, **extra})


def _adapted(component: str, module: nn.Module) -> set[str]:
    """The layers that PEFT has given a change, as `component.path`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    start = "text_model." if component != DENOISER and not hasattr(module, "text_model") else ""
    return {
        f"{component}.{start}{path}"
        for path, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer) and layer.get_delta_weight(layer.active_adapters[0]).any()
    }


def _answer_of(model: Model, denoiser: nn.Module, given: Inputs) -> Tensor:
    """The answer of another denoiser of the same family."""
    return answer(replace(model, components=replace(model.components, denoiser=denoiser.eval())), given)


def _original_layers(model: Model) -> nn.Module:
    """The checkpoint's layers as a tree of modules under its own names, without a forward of their own."""
    assert model.path is not None
    owners: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(str(model.path)).items():
        owner, _, leaf = name.removeprefix("model.diffusion_model.").rpartition(".")
        owners.setdefault(owner, {})[leaf] = tensor
    root = nn.Module()
    for owner, tensors in owners.items():
        if not owner:  # parameters of the model itself, such as Z-Image's padding tokens
            for leaf, tensor in tensors.items():
                root.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            continue
        here = root
        *parents, last = owner.split(".")
        for parent in parents:
            if not hasattr(here, parent):
                here.add_module(parent, nn.Module())
            here = getattr(here, parent)
        if hasattr(here, last):  # a block with parameters of its own, such as Wan's modulation
            for leaf, tensor in tensors.items():
                getattr(here, last).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            here.add_module(last, _layer(tensors))
    return root


def _layer(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A layer of the class that has such tensors."""
    size, has_bias = tensors.get("weight", torch.empty(0)).shape, "bias" in tensors
    layer = nn.Module()
    if len(size) == 2:
        layer = nn.Linear(size[1], size[0], bias=has_bias, device="meta")
    elif len(size) == 4:
        layer = nn.Conv2d(size[1], size[0], size[2:], bias=has_bias, device="meta")
    elif len(size) == 5:
        layer = nn.Conv3d(size[1], size[0], size[2:], bias=has_bias, device="meta")
    elif has_bias:
        layer = nn.LayerNorm(size, device="meta")
    for leaf, tensor in tensors.items():
        layer.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return layer
