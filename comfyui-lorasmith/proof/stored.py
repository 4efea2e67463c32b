"""MODELs whose weights are stored, quantized or patched in other ways, beside MODELs of the same weights in fp32."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import checkout
import families
from measuring import Meter
from parity import distance, pictures, settings


def kinds(family: str) -> dict[str, Any]:
    """MODELs in narrower dtypes and with a LoRA, beside a MODEL of the same weights in fp32."""
    checkout.pack()
    from lorasmith_pack.comfy_model import ComfyModel

    result: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        model = families.model_of(family, dtype)
        found = compared(family, model, model.model.diffusion_model.state_dict())
        result |= {f"{name} {str(dtype).removeprefix('torch.')}": value for name, value in found.items()}
    model = families.model_of(family)
    weights = {name: one.clone() for name, one in model.model.diffusion_model.state_dict().items()}
    patched, merged = with_lora(model, weights)
    bare, changed = ComfyModel(model).identity(), ComfyModel(patched).identity()
    found = compared(family, patched, merged)
    result |= {f"{name} with a LoRA": value for name, value in found.items()}
    result["known again"] = bare == ComfyModel(model).identity() != changed == ComfyModel(patched).identity()
    return result


def stored(family: str) -> dict[str, Any]:
    """MODELs with quantized layers, beside a MODEL of the dequantized weights."""
    checkout.pack()
    import comfy.quant_ops

    result: dict[str, Any] = {}
    formats = comfy.quant_ops.QUANT_ALGOS  # of which older versions have fewer
    known = [kind for kind in families.QUANTIZED if kind.partition(",")[0] in formats]
    if "pre_quant_scale" not in formats["nvfp4"]["parameters"]:
        known = [kind for kind in known if "smoothed" not in kind]
    ways: dict[str, Callable[[], Any]] = {
        kind: functools.partial(families.quantized_of, family, kind) for kind in (*known, "scaled_fp8")
    }
    if pack := os.environ.get("COMFYUI_GGUF"):
        sys.path.insert(0, str(Path(pack).parent))
        theirs = importlib.import_module(Path(pack).name)
        ways |= {f"GGUF {kind}": functools.partial(families.gguf_of, family, kind, theirs) for kind in families.GGUF}
        ways["GGUF with a LoRA"] = ways["GGUF Q8_0"]
    for kind, make in ways.items():
        with torch.inference_mode():  # as ComfyUI calls its loaders
            model = make()
        weights = dequantized(model.model.diffusion_model)
        if "LoRA" in kind:
            model, weights = with_lora(model, weights)
        found = compared(family, model, weights)
        result |= {f"{name} {kind}": value for name, value in found.items()}
    return result


def memory_modes(family: str) -> dict[str, Any]:
    """MODELs with a LoRA, with all or half of the weights kept apart from the device, and one loaded dynamically."""
    checkout.pack()
    import comfy.model_management as management
    import comfy.model_patcher
    from lorasmith_pack.comfy_model import ComfyModel

    load = management.LoadedModel.model_load
    result: dict[str, Any] = {}
    for mode, share in {"--novram": 0.0, "--lowvram": 0.5, "--novram, quantized": 0.0}.items():
        with torch.inference_mode():
            make = functools.partial(families.quantized_of, kind="float8_e4m3fn")
            model = make(family) if "quantized" in mode else families.model_of(family)
        patched, merged = with_lora(model, dequantized(model.model.diffusion_model))
        limit = share * model.model_size()

        def partial(self: Any, memory: float = 0, limit: float = limit, only: Any = model.model, **others: Any) -> Any:
            more = max(0.1, limit - self.model.loaded_size())
            return load(self, more if self.model.model is only else memory, **others)

        management.LoadedModel.model_load = partial
        try:
            found = compared(family, patched, merged)
            trained = ComfyModel(patched)
            with trained.loaded(torch.float32):
                layers = [one for one in trained.module.modules() if hasattr(one, "prev_comfy_cast_weights")]
            functions = sum(len(one.weight_function) for one in layers)
        finally:
            management.LoadedModel.model_load = load
        found["apart"] = bool(layers) and (functions == 1 or share > 0)
        result |= {f"{name} {mode}": value for name, value in found.items()}
    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if hasattr(dynamic, "get_non_dynamic_delegate"):
        model = families.model_of(family)
        weights = {name: one.clone() for name, one in model.model.diffusion_model.state_dict().items()}
        patched, merged = with_lora(model, weights)
        methods = {"is_dynamic": lambda self: True, "get_non_dynamic_delegate": dynamic.get_non_dynamic_delegate}
        patched.__class__ = type("Dynamic", (type(patched),), methods)
        patched.non_dynamic_delegate_model = None
        plain = families.model_of(family)
        plain.model.diffusion_model.load_state_dict(merged)
        (loss, found, _), (expected, right, _) = first(family, patched, loaded=False), first(family, plain)
        after = model.model.diffusion_model.state_dict()
        result["loss dynamic"], result["gradient dynamic"] = abs(loss - expected) / expected, distance(found, right)
        result["same bits dynamic"] = all(torch.equal(after[name], one) for name, one in weights.items())
        result["released dynamic"] = patched.non_dynamic_delegate_model is None
    return result


_QUERIES = ("qkv.weight", "to_q.weight", ".q.weight", "q_proj.weight", ".wq.weight")


def dequantized(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a network, fp32."""
    found = {}
    for path, layer in module.named_modules():
        for name, one in layer.named_parameters(recurse=False):
            if name == "pre_quant_scale":
                continue
            if hasattr(one, "tensor_type"):
                one = layer.get_weight(one, torch.float32)
            found[f"{path}.{name}".lstrip(".")] = (one.dequantize() if hasattr(one, "_qdata") else one).detach().float()
    return found


def with_lora(model: Any, weights: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A MODEL with a LoRA on it, and its weights, which were `weights`, with that LoRA."""
    import comfy.sd

    name = next(name for name in weights if name.endswith(_QUERIES))
    rows, columns = weights[name].shape
    up, down = torch.ones(rows, 1) * 0.1, torch.ones(1, columns) * 0.1
    key = f"diffusion_model.{name.removesuffix('.weight')}"
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(1.0)}
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0.0)
    return patched, {**weights, name: weights[name] + 0.5 * up @ down}


def first(family: str, model: Any, *, loaded: bool = True) -> tuple[float, dict[str, torch.Tensor], float]:
    """Loss and gradients of the first step of a LoRA that is not zero, and its peak MB above the loaded MODEL."""
    import comfy.model_management
    from lorasmith_pack.comfy_model import ComfyModel

    import lorasmith

    if loaded:
        comfy.model_management.load_models_gpu([model])
    trained, meter = ComfyModel(model), Meter()
    samples = trained.samples(*families.data_of(family))
    trainer = lorasmith.Trainer(trained, samples, **settings(zero_init="up", alpha=8.0))
    for name, weight in trainer.weights.items():
        generator = torch.Generator().manual_seed(len(name))
        weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    ctypes.CDLL(None).malloc_trim(0)
    meter.start()
    with contextlib.closing(iter(trainer)) as steps:
        loss = float(next(steps).gradient().mean())
        gradients = {name: one.flatten(1).clone() for name, one in trainer.gradients.items()}
    return loss, gradients, meter.found()["MB above"]


def compared(family: str, model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The first step, beside that of a MODEL of these weights in fp32."""
    positive = families.data_of(family)[1]
    plain = families.model_of(family)
    plain.model.diffusion_model.load_state_dict({name: one.float() for name, one in weights.items()}, strict=False)
    for path, layer in model.model.diffusion_model.named_modules():
        if hasattr(layer, "pre_quant_scale"):
            factor = layer.pre_quant_scale.detach().clone()
            plain.model.diffusion_model.get_submodule(path).register_forward_pre_hook(_times(factor))
    before = pictures(model, positive, size=families.FAMILIES[family].size)
    (loss, found, above), (expected, right, plain_above) = first(family, model), first(family, plain)
    size = sum(one.numel() for one in plain.model.diffusion_model.parameters()) * 4 / 2**20
    return {
        "loss": abs(loss - expected) / expected,
        "gradient": distance(found, right),
        "same bits": torch.equal(before, pictures(model, positive, size=families.FAMILIES[family].size)),
        **({"copied": (above - plain_above) / size} if size > 50 else {}),  # of smaller ones chance decides
    }


def _times(factor: torch.Tensor) -> Callable[[Any, Any], Any]:
    return lambda layer, given: (given[0] * factor, *given[1:])
