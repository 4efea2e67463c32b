"""diffusers' layout: `unet.<path>.lora_A.weight` and `.lora_B.weight` as PEFT names them, A being the down matrix.

Alpha has no tensor here. diffusers keeps it in the header, as JSON under `lora_adapter_metadata`, where the other
programs that read this layout do not look: without it they scale by 1. Written files are right for both: alpha / rank
is multiplied into the factors, and the header says that alpha equals the rank.

Read as well: older diffusers (`.lora.down.weight`, `.processor.to_q_lora.down.weight`), PEFT's own `base_model.model.`,
paths with no prefix at all, original paths in their place, `.alpha` tensors.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.formats.layout import LAYOUTS, Layout
from lorasmith.formats.names import ModelNames
from lorasmith.formats.places import (
    Parts,
    addressed,
    diffusers_places,
    encoder_paths,
    original_places,
    read_tensors,
)
from lorasmith.formats.spelling import PEFT, ModuleTensors, grouped, scale_of, spelled, split_key

__all__ = ["ADAPTER_METADATA", "DiffusersLayout", "metadata_of_peft_config"]

ADAPTER_METADATA = "lora_adapter_metadata"
"""Header entry in which diffusers keeps the fields of PEFT's LoraConfig, each behind its component's name."""


class DiffusersLayout(Layout):
    """Dotted diffusers paths behind `unet.`, `transformer.` and `text_encoder.`, alpha baked in."""

    name = "diffusers"
    title = "diffusers / PEFT"

    def detects(self, keys: Iterable[str]) -> int:
        return sum(bool(_PREFIX.match(key) and split_key(key)) for key in keys)

    def bases(self, names: ModelNames) -> Mapping[str, Parts]:
        bases: dict[str, Parts] = {}
        for path, parts in {**original_places(names), **diffusers_places(names)}.items():
            for spelling in _spellings(path):
                bases |= {prefix + spelling: parts for prefix in _DENOISER_PREFIXES}
        for component in names.text_encoders:
            for path, parts in encoder_paths(names, component):
                bases[f"{component}.{path}"] = parts
                bases.setdefault(f"base_model.model.{path}", parts)
        return bases

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        """Raises LoraError when the header's `lora_adapter_metadata` is malformed."""
        return read_tensors(tensors, self.bases(names), names, _stated_alphas(tensors, metadata))

    def write(self, state: AdapterState, names: ModelNames) -> dict[str, Tensor]:
        def base_of(ref: ModuleRef) -> str:
            return f"{_prefix(ref.component, names)}.{ref.path}"

        return {
            base + suffix: tensor
            for base, module in addressed(state, names, base_of).items()
            for suffix, tensor in spelled(_baked(module), PEFT, alpha=False).items()
        }

    def header(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        fields: dict[str, Any] = {}
        for component in dict.fromkeys(ref.component for ref in state.adapters):
            loras = {
                ref.path: weights
                for ref, weights in state.adapters.items()
                if ref.component == component and weights.algorithm == "lora"
            }
            if loras:
                prefix = _prefix(component, names)
                fields |= {f"{prefix}.{field}": value for field, value in _lora_config(loras).items()}
        return {ADAPTER_METADATA: json.dumps(fields, sort_keys=True)} if fields else {}


def metadata_of_peft_config(config: str) -> dict[str, str]:
    """The header entry that says what the `adapter_config.json` of a PEFT folder says.

    Raises:
        LoraError: it is not the configuration of a LoRA.
    """
    try:
        fields = json.loads(config)
        kind = fields.get("peft_type", "LORA")
    except (ValueError, AttributeError, RecursionError):
        raise LoraError("adapter_config.json must be a JSON object, and it is not; get the file again") from None
    if kind != "LORA":
        raise LoraError(f"PEFT adapters of type LORA can be read, and this one is {kind}; export it in another format")
    return {ADAPTER_METADATA: json.dumps({f"base_model.model.{name}": value for name, value in fields.items()})}


LAYOUTS.register(DiffusersLayout.name, "peft")(DiffusersLayout())

_ENCODER_PREFIX = "text_model."
_DENOISER_PREFIXES = ("unet.", "transformer.", "base_model.model.", "")
_PREFIX = re.compile(
    r"unet\.|transformer\.|text_encoder(_2|_3)?\.|base_model\.model\.|(single_)?transformer_blocks\.|"
    r"(down|mid|up|double|single|joint)_blocks?\."
)


def _prefix(component: str, names: ModelNames) -> str:
    return names.peft_prefix if component == DENOISER else component


def _spellings(path: str) -> Iterator[str]:
    """A path as PEFT has it and, for attention projections, as diffusers' attention processors had it."""
    yield path
    parent, _, projection = path.rpartition(".attn1.")
    if not parent:
        parent, _, projection = path.rpartition(".attn2.")
    if projection in ("to_q", "to_k", "to_v", "to_out.0"):
        attention = path.removesuffix(projection)
        yield f"{attention}processor.{projection.removesuffix('.0')}"


def _baked(module: ModuleTensors) -> ModuleTensors:
    """A LoRA with alpha / rank multiplied into its factors.

    Half of the scale, as a power of two, goes into the down matrix and the rest into the up matrix: a small scale on
    one side alone would push fp16 values below what fp16 can hold.
    """
    weights = module.adapter
    if weights is None or weights.algorithm != "lora":
        return module
    scale = scale_of(weights)
    if scale == 1.0:
        return module
    share = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0
    down, up = weights.tensors["down"], weights.tensors["up"]
    tensors = {
        **weights.tensors,
        "down": (down.float() * share).to(down.dtype),
        "up": (up.float() * (scale / share)).to(up.dtype),
    }
    return replace(module, adapter=replace(weights, tensors=tensors))


def _lora_config(loras: Mapping[str, AdapterWeights]) -> dict[str, Any]:
    """Fields of PEFT's LoraConfig for LoRAs whose alpha is their rank."""
    ranks = {path: weights.tensors["down"].shape[0] for path, weights in loras.items()}
    counts = collections.Counter(ranks.values())
    common = max(counts, key=lambda rank: (counts[rank], -rank))
    others = {_pattern(path): rank for path, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(path.removeprefix(_ENCODER_PREFIX) for path in loras),
        "use_dora": any("dora_scale" in weights.tensors for weights in loras.values()),
    }


def _pattern(path: str) -> str:
    """A regular expression by which PEFT finds a module; it may match the end of a path unless a caret forbids that.

    Text encoders need that, for some versions of transformers have `text_model.` in front of their paths.
    """
    start = "" if path.startswith(_ENCODER_PREFIX) else "^"
    return start + re.escape(path.removeprefix(_ENCODER_PREFIX))


@dataclass(frozen=True)
class _Config:
    """What of a LoraConfig decides the scale."""

    alpha: float
    pattern: Mapping[str, float]
    rank_stabilized: bool

    def alpha_of(self, path: str, rank: int) -> float:
        """The numerator of alpha / rank. rsLoRA scales by alpha / √rank, which is an alpha √rank times as large."""
        # The same matching as PEFT's, which takes the keys as regular expressions for the end of a path.
        matches = (alpha for key, alpha in self.pattern.items() if re.match(rf"(.*\.)?({key})$", path))
        alpha = float(next(matches, self.alpha))
        return alpha * math.sqrt(rank) if self.rank_stabilized else alpha


def _stated_alphas(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, float]:
    """Alphas by base, as the header gives them for the bases that hold a LoRA."""
    if ADAPTER_METADATA not in metadata:
        return {}
    try:
        configs = _configs(json.loads(metadata[ADAPTER_METADATA]))
        return {
            base: config.alpha_of(base.removeprefix(prefix), tensors[keys["down"]].shape[0])
            for prefix, config in configs.items()
            for base, keys in grouped(tensors).items()
            if "down" in keys and base.startswith(prefix)
        }
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError, re.error) as problem:
        raise LoraError(
            f"the header entry {ADAPTER_METADATA} must be JSON with the fields of a LoraConfig, and it is not "
            f"({problem}); get the file again, or save it anew from the program that made it"
        ) from problem


def _configs(fields: Mapping[str, Any]) -> dict[str, _Config]:
    """LoraConfigs by prefix of their keys, longest last: `unet.`, or nothing where diffusers saved a single model."""
    prefixes = sorted({name.removesuffix("lora_alpha") for name in fields if name.endswith("lora_alpha")}, key=len)
    return {
        prefix: _Config(
            alpha=float(fields[f"{prefix}lora_alpha"]),
            pattern=dict(fields.get(f"{prefix}alpha_pattern") or {}),
            rank_stabilized=bool(fields.get(f"{prefix}use_rslora")),
        )
        for prefix in prefixes
    }
