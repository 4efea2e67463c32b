"""PEFT's layout: a folder with `adapter_model.safetensors` (`base_model.model.<path>.lora_A.weight`, `.lora_B.weight`)
and `adapter_config.json`, which has the ranks and alphas.

The denoiser's adapter is in the folder itself, a text encoder's in a subfolder of the component's name, as scripts that
train both with PEFT save them. One folder holds one kind of adapter: LoRA, with DoRA's magnitudes for each output or
without; or LoHa or LoKr, whose tensors have LyCORIS' names and meaning in PEFT too. Its OFT and BOFT are others.

LoKr's factors must be of the sizes that PEFT itself would choose from one `decompose_factor` and the rank.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.formats.layouts.layout import LAYOUTS, Layout, Loss
from lorasmith.formats.layouts.peft_config import configs_of, rank_fields, stated_alphas, targets, uneven_magnitudes
from lorasmith.formats.names.model_names import ModelNames
from lorasmith.formats.names.places import Parts, addressed, diffusers_places, encoder_paths, read_tensors
from lorasmith.formats.names.prefixes import PEFT as PREFIX
from lorasmith.formats.names.spelling import (
    PEFT,
    ModuleTensors,
    kronecker_shapes,
    multiplied,
    rank_of,
    spelled,
    split_key,
    without_core,
)

__all__ = ["PEFT_CONFIG", "PeftLayout"]

PEFT_CONFIG = "adapter_config.json"


class PeftLayout(Layout):
    """diffusers' paths behind `base_model.model.`, alpha in a file of its own."""

    name = "peft"
    title = "PEFT"
    in_folder = True

    def detects(self, keys: Iterable[str]) -> int:
        return sum(key.rpartition("/")[2].startswith(PREFIX) and split_key(key) is not None for key in keys)

    def bases(self, names: ModelNames) -> Mapping[str, Parts]:
        bases = {PREFIX + path: parts for path, parts in diffusers_places(names).items()}
        for component in names.text_encoders:
            for path, parts in encoder_paths(names, component):
                bases[_folder(component) + PREFIX + path] = parts
                bases.setdefault(PREFIX + path, parts)
        return bases

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        state = read_tensors(tensors, self.bases(names), names, stated_alphas(tensors, metadata))
        configs = configs_of(metadata)
        for ref, weights in state.adapters.items():
            config = configs.get(_folder(ref.component) + PREFIX)
            if weights.algorithm == "lokr" and rank_of(weights) is None and config is not None:
                # PEFT scales whole factors too; all others take them as they are.
                scale = config.alpha_of(ref.path, None) / config.rank_of(ref.path)
                scaled = {**weights.tensors, "lokr_w1": multiplied(weights.tensors["lokr_w1"], scale)}
                state.adapters[ref] = AdapterWeights("lokr", scaled)
        return state

    def write(self, state: AdapterState, names: ModelNames) -> dict[str, Tensor]:
        def base_of(ref: ModuleRef) -> str:
            return f"{_folder(ref.component)}{PREFIX}{_installed_path(ref, names)}"

        return {
            base + suffix: tensor
            for base, module in addressed(state, names, base_of).items()
            for suffix, tensor in spelled(_without_core(module), PEFT, alpha=False).items()
            if suffix != ".alpha"
        }

    def header(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        return {}

    def losses(self, state: AdapterState, names: ModelNames) -> list[Loss]:
        reasons: dict[ModuleRef, str] = {}
        for component, adapters in _by_component(state).items():
            refs = {ModuleRef(component, path): weights for path, weights in adapters.items()}
            reasons |= _odd_ones_out(refs, names)
        return [
            *(Loss(ref, reasons[ref]) for ref in state.adapters if ref in reasons),
            *(Loss(ref, "PEFT has no differences of weights, norms and biases") for ref in state.differences),
        ]

    def companions(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        return {
            _folder(component) + PEFT_CONFIG: json.dumps(_config(component, adapters, names), indent=2, sort_keys=True)
            + "\n"
            for component, adapters in _by_component(state).items()
        }


LAYOUTS.register(PeftLayout.name)(PeftLayout())

_KINDS = {"lora": "LORA", "loha": "LOHA", "lokr": "LOKR"}


def _folder(component: str) -> str:
    return "" if component == DENOISER else f"{component}/"


def _installed_path(ref: ModuleRef, names: ModelNames) -> str:
    """A module's path in the version of transformers that is installed, for PEFT matches paths to the letter.

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


def _without_core(module: ModuleTensors) -> ModuleTensors:
    return module if module.adapter is None else replace(module, adapter=without_core(module.adapter))


def _config(component: str, adapters: Mapping[str, AdapterWeights], names: ModelNames) -> dict[str, Any]:
    """Content of `adapter_config.json` for adapters of one kind."""
    algorithm = next(iter(adapters.values())).algorithm
    fields: dict[str, Any] = {
        "peft_type": _KINDS[algorithm],
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": targets(adapters, names.paths(component)),
        **rank_fields(adapters),
    }
    if algorithm == "lora":
        dora = any("dora_scale" in weights.tensors for weights in adapters.values())
        return fields | {"bias": "none", "use_dora": dora, "use_rslora": False}
    fields["alpha"] = fields.pop("lora_alpha")
    fields["use_effective_conv2d"] = any(_has_core(weights) for weights in adapters.values())
    if algorithm == "lokr":
        factors = [_Factors.of(ModuleRef(component, path), weights, names) for path, weights in adapters.items()]
        fields["decompose_both"] = any(not one.whole_first for one in factors)
        fields["decompose_factor"] = _best_factor(factors)
    return fields


def _odd_ones_out(adapters: Mapping[ModuleRef, AdapterWeights], names: ModelNames) -> dict[ModuleRef, str]:
    """Adapters that do not fit into one folder with the others, and why."""
    unknown = {ref: weights.algorithm for ref, weights in adapters.items() if weights.algorithm not in _KINDS}
    reasons = {ref: f"PEFT has no {algorithm} like this one" for ref, algorithm in unknown.items()}
    rest = {ref: weights for ref, weights in adapters.items() if ref not in unknown}
    if not rest:
        return reasons
    counts = collections.Counter(weights.algorithm for weights in rest.values())
    kind = max(sorted(counts), key=counts.__getitem__)
    others = [ref for ref, weights in rest.items() if weights.algorithm != kind]
    reasons |= dict.fromkeys(others, f"a PEFT folder holds one kind of adapter, and most here are {kind}")
    rest = {ref: weights for ref, weights in rest.items() if weights.algorithm == kind}
    if kind == "lora":
        return reasons | uneven_magnitudes(rest)
    decomposed = [ref for ref, weights in rest.items() if "dora_scale" in weights.tensors]
    reasons |= dict.fromkeys(decomposed, f"PEFT's {kind} has no magnitudes")
    cores = {ref for ref, weights in rest.items() if _has_core(weights)}
    kernels = {ref for ref in rest if _kernel(ref, names) > 1}
    odd = min(cores, kernels - cores, key=len)
    reasons |= dict.fromkeys(odd, f"PEFT gives a Tucker core to all convolutions of a {kind} or to none")
    return reasons | (_odd_factors(rest, names) if kind == "lokr" else {})


def _has_core(weights: AdapterWeights) -> bool:
    return bool({"hada_t1", "lokr_t2"} & weights.tensors.keys())


def _kernel(ref: ModuleRef, names: ModelNames) -> int:
    """Number of weights in a module's convolution kernel, 1 for a Linear."""
    shape = names.weight_shapes.get(ref.path, ()) if ref.component == DENOISER else ()
    return math.prod(shape[2:])


@dataclass(frozen=True)
class _Factors:
    """A LoKr's sizes: out = out_l · out_k and in = in_m · in_n channels, and which factors are whole."""

    out: tuple[int, int]
    inside: tuple[int, int]
    rank: int
    whole_first: bool
    whole_second: bool

    @classmethod
    def of(cls, ref: ModuleRef, weights: AdapterWeights, names: ModelNames) -> _Factors:
        (out_l, in_m), (out_k, *inner) = kronecker_shapes(weights.tensors)
        flat = len(inner) == 1  # then a convolution's kernel is in the last dimension as well
        in_n = inner[0] // _kernel(ref, names) if flat else inner[0]
        rank = rank_of(weights) or max(out_k, in_n)
        whole = ("lokr_w1" in weights.tensors, "lokr_w2" in weights.tensors)
        return cls((out_l, out_k), (in_m, in_n), rank, *whole)

    def made_by(self, factor: int, decompose_both: bool) -> bool:
        """Whether PEFT would make factors of these sizes."""
        whole_first = not (decompose_both and self.rank < max(self.out[0], self.inside[0]) / 2)
        whole_second = self.rank >= max(self.out[1], self.inside[1]) / 2
        return (
            _factorized(math.prod(self.out), factor) == self.out
            and _factorized(math.prod(self.inside), factor) == self.inside
            and (whole_first, whole_second) == (self.whole_first, self.whole_second)
        )


def _odd_factors(adapters: Mapping[ModuleRef, AdapterWeights], names: ModelNames) -> dict[ModuleRef, str]:
    factors = {ref: _Factors.of(ref, weights, names) for ref, weights in adapters.items()}
    factor = _best_factor(list(factors.values()))
    both = any(not one.whole_first for one in factors.values())
    reason = f"PEFT makes LoKr's factors by one rule for all modules (decompose_factor, here {factor}), of other sizes"
    return {ref: reason for ref, one in factors.items() if not one.made_by(factor, both)}


def _best_factor(factors: Sequence[_Factors]) -> int:
    """The `decompose_factor` that gives most of the adapters the sizes that they have."""
    both = any(not one.whole_first for one in factors)
    candidates = sorted({-1, *(one.out[0] for one in factors), *(one.inside[0] for one in factors)})
    return max(candidates, key=lambda factor: sum(one.made_by(factor, both) for one in factors))


def _factorized(size: int, factor: int) -> tuple[int, int]:
    """How PEFT takes a size apart: into `factor` and the rest, or where that does not divide into the most equal two
    divisors of which the smaller is at most `factor` (any, for −1)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return first, size // first
