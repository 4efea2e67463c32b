"""PEFT's layout: a folder with `adapter_model.safetensors` (`base_model.model.<path>.lora_A.weight`, `.lora_B.weight`)
and `adapter_config.json`, which has the ranks and alphas.

The denoiser's adapter is in the folder itself, a text encoder's in a subfolder of the component's name, as scripts that
train both with PEFT save them. One folder holds one kind of adapter: LoRA, with DoRA's magnitudes for each output or
without; or LoHa or LoKr, whose tensors have LyCORIS' names and meaning in PEFT too. PEFT's OFT and BOFT differ.

LoKr's factors must have the sizes that PEFT computes from one `decompose_factor` and the rank.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import (
    COMFYUI,
    DENOISER,
    DIFFUSERS,
    AdapterState,
    AdapterWeights,
    ModuleRef,
    multiplied,
)
from lorasmith.formats.layouts.adapter_config import configs_of
from lorasmith.formats.layouts.layout import Layout, Lost
from lorasmith.formats.names import ModelNames, PlacedModules, diffusers_places, encoder_paths, other_places
from lorasmith.formats.scales import rank_of
from lorasmith.formats.spelling import PEFT, ModuleTensors, scales_outputs, spelled, split_key, without_core
from lorasmith.formats.spelling import PEFT_PREFIX as PREFIX

PEFT_CONFIG = "adapter_config.json"


class PeftLayout(Layout):
    """diffusers' paths after `base_model.model.`, alpha in a file of its own."""

    name = "peft"
    title = "PEFT"
    in_folder = True
    has_diffusers_names = True
    holds_words = False
    refused_by = MappingProxyType(
        {
            **Layout.refused_by,
            COMFYUI: "it loads files, not PEFT's folders",
            DIFFUSERS: "it loads its own layout, not PEFT's folders",
        }
    )

    def detects(self, keys: Iterable[str]) -> int:
        return sum(key.rpartition("/")[2].startswith(PREFIX) and split_key(key) is not None for key in keys)

    def bases(self, names: ModelNames) -> Mapping[str, PlacedModules]:
        bases = {PREFIX + path: parts for path, parts in {**other_places(names), **diffusers_places(names)}.items()}
        for component in names.text_encoders:
            for path, parts in encoder_paths(names, component):
                bases[_folder(component) + PREFIX + path] = parts
                bases.setdefault(PREFIX + path, parts)
        return bases

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        state = super().read(tensors, metadata, names)
        configs = configs_of(metadata)
        for ref, weights in state.adapters.items():
            config, kind = configs.get(_folder(ref.component) + PREFIX), format_of(weights).peft
            if kind is not None and kind.scaled and rank_of(weights) is None and config is not None:
                # PEFT scales whole factors too; other programs do not.
                scale = config.alpha_of(ref.path, None) / config.rank_of(ref.path)
                scaled = {**weights.tensors, kind.scaled: multiplied(weights.tensors[kind.scaled], scale)}
                state.adapters[ref] = replace(weights, tensors=scaled, alpha=None)
        return state

    def base_of(self, ref: ModuleRef, names: ModelNames) -> str:
        return f"{_folder(ref.component)}{PREFIX}{_installed_path(ref, names)}"

    def spelled(self, module: ModuleTensors) -> dict[str, Tensor]:
        if module.adapter is not None:
            module = replace(module, adapter=without_core(module.adapter))
        tensors = spelled(module, PEFT, alpha=False)
        return {suffix: tensor for suffix, tensor in tensors.items() if suffix != ".alpha"}

    def losses(self, state: AdapterState, names: ModelNames) -> list[Lost]:
        reasons: dict[ModuleRef, str] = {}
        for component, adapters in _by_component(state).items():
            odd = _odd_ones_out(component, adapters, names)
            reasons |= {ModuleRef(component, path): reason for path, reason in odd.items()}
        return [
            *(Lost(ref, reasons[ref]) for ref in state.adapters if ref in reasons),
            *(Lost(ref, "PEFT has no differences of weights, norms and biases") for ref in state.differences),
        ]

    def companions(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        return {
            _folder(component) + PEFT_CONFIG: json.dumps(_config(component, adapters, names), indent=2, sort_keys=True)
            + "\n"
            for component, adapters in _by_component(state).items()
        }


def _folder(component: str) -> str:
    return "" if component == DENOISER else f"{component}/"


def _installed_path(ref: ModuleRef, names: ModelNames) -> str:
    """A module's path in the installed version of transformers, because PEFT matches paths literally.

    Version 5.6 dropped `text_model.` from CLIPTextModel, though not from the class with a projection (OpenCLIP bigG).
    """
    if ref.component == DENOISER or not names.text_encoders[ref.component].drops_text_model:
        return ref.path
    installed = tuple(int(part) for part in version("transformers").split(".")[:2])
    return ref.path.removeprefix("text_model.") if installed >= (5, 6) else ref.path


def _by_component(state: AdapterState) -> dict[str, dict[str, AdapterWeights]]:
    components: dict[str, dict[str, AdapterWeights]] = {}
    for ref, weights in state.adapters.items():
        components.setdefault(ref.component, {})[ref.path] = weights
    return components


def _config(component: str, adapters: Mapping[str, AdapterWeights], names: ModelNames) -> dict[str, Any]:
    """Content of `adapter_config.json` for adapters of one kind."""
    kind = format_of(next(iter(adapters.values()))).peft
    assert kind is not None
    ranks = rank_fields(adapters)
    alpha = ranks.pop("lora_alpha")
    return {
        "peft_type": kind.name,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": targets(adapters, names.paths(component)),
        **ranks,
        kind.alpha: alpha,
        **kind.fields(adapters, _kernels(component, adapters, names)),
    }


def _kernels(component: str, paths: Iterable[str], names: ModelNames) -> dict[str, int]:
    """Number of weights in the convolution kernel of each module, 1 for a Linear."""
    shapes = names.weight_shapes if component == DENOISER else {}
    return {path: math.prod(shapes.get(path, ())[2:]) for path in paths}


def _odd_ones_out(component: str, adapters: Mapping[str, AdapterWeights], names: ModelNames) -> dict[str, str]:
    """Adapters that do not fit into one folder with the others, and why, by module path."""
    kinds = {path: kind for path, weights in adapters.items() if (kind := format_of(weights).peft) and not kind.differs}
    reasons = {path: f"PEFT has no {adapters[path].algorithm} like this one" for path in adapters if path not in kinds}
    if not kinds:
        return reasons
    counts = collections.Counter(adapters[path].algorithm for path in kinds)
    algorithm = max(sorted(counts), key=counts.__getitem__)
    rest = {path: adapters[path] for path in kinds if adapters[path].algorithm == algorithm}
    others = [path for path in kinds if path not in rest]
    reasons |= dict.fromkeys(others, f"a PEFT folder holds one kind of adapter, and most here are {algorithm}")
    kind, kernels = kinds[next(iter(rest))], _kernels(component, rest, names)
    if kind.magnitudes:
        return reasons | uneven_magnitudes(rest)
    decomposed = [path for path, weights in rest.items() if "dora_scale" in weights.tensors]
    reasons |= dict.fromkeys(decomposed, f"PEFT's {algorithm} has no magnitudes")
    cores = {path for path, weights in rest.items() if format_of(weights).cores & weights.tensors.keys()}
    odd = min(cores, {path for path in rest if kernels[path] > 1} - cores, key=len)
    reasons |= dict.fromkeys(odd, f"PEFT gives a Tucker core to all convolutions of a {algorithm} or to none")
    return reasons | kind.misfits(rest, kernels)


T = TypeVar("T", bound=Hashable)

_ENCODER_PREFIX = "text_model."


def rank_fields(adapters: Mapping[str, AdapterWeights], *, alpha_is_rank: bool = False) -> dict[str, Any]:
    """`r`, `lora_alpha` and their patterns for adapters by module path."""
    ranks = {path: _rank(weights) for path, weights in adapters.items()}
    alphas = {
        path: ranks[path] if alpha_is_rank or weights.alpha is None or rank_of(weights) is None else weights.alpha
        for path, weights in adapters.items()
    }
    rank, alpha = _most_frequent(ranks.values()), _most_frequent(alphas.values())
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {_pattern(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(path): _plain(value) for path, value in alphas.items() if value != alpha},
    }


def targets(paths: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """`target_modules` that match exactly these paths among a model's modules.

    A list where that is enough, which every program reads; a regular expression where one of the paths is also the end
    of another module's.
    """
    chosen = {path.removeprefix(_ENCODER_PREFIX) for path in paths}
    others = {path.removeprefix(_ENCODER_PREFIX) for path in modules} - chosen
    ends = {other[index + 1 :] for other in others for index, letter in enumerate(other) if letter == "."}
    if not chosen & ends:
        return sorted(chosen)
    return rf"({re.escape(_ENCODER_PREFIX)})?({'|'.join(re.escape(path) for path in sorted(chosen))})"


def uneven_magnitudes(loras: Mapping[T, AdapterWeights]) -> dict[T, str]:
    """LoRAs that a configuration cannot describe together with the others, and why.

    PEFT's DoRA has a magnitude for each output, and a LoRA has one in all of its modules or in none.
    """
    reasons = {}
    with_magnitudes = set()
    for ref, weights in loras.items():
        if "dora_scale" not in weights.tensors:
            continue
        if scales_outputs(weights):
            with_magnitudes.add(ref)
        else:
            reasons[ref] = "PEFT knows DoRA's magnitudes for each output alone, and these are for each input"
    without = loras.keys() - with_magnitudes - reasons.keys()
    odd = min(with_magnitudes, without, key=len)
    reasons |= dict.fromkeys(odd, "PEFT gives DoRA's magnitudes to all modules of a LoRA or to none")
    return reasons


def _rank(weights: AdapterWeights) -> int:
    """The rank in the configuration, which an adapter without one needs too."""
    rank, kind = rank_of(weights), format_of(weights).peft
    return rank or (kind.unscaled(weights.tensors) if kind is not None and kind.unscaled is not None else 1)


def _most_frequent(values: Iterable[float]) -> Any:
    counts = collections.Counter(values)
    return max(counts, key=lambda value: (counts[value], -value))


def _plain(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _pattern(path: str) -> str:
    """A regular expression by which PEFT finds a module; without a caret it may match the end of a path.

    Text encoders need that, because some versions of transformers have `text_model.` in front of their paths.
    """
    start = "" if path.startswith(_ENCODER_PREFIX) else "^"
    return start + re.escape(path.removeprefix(_ENCODER_PREFIX))
