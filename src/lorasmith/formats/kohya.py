"""kohya's layout: `lora_unet_down_blocks_0_…_to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`.

Module paths have their dots flattened to underscores, so names are looked up in tables made from the model and never
taken apart. UNets of Stable Diffusion 1 and 2 go by diffusers' names, SDXL and transformers by those of the original
checkpoint. LyCORIS uses the same layout for its algorithms.

Read as well: the other naming, `lycoris_` (LyCORIS' wrapper), `lora_transformer_` (OneTrainer).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
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
from lorasmith.formats.spelling import KOHYA, spelled, split_key

__all__ = ["KohyaLayout"]


class KohyaLayout(Layout):
    """Flattened module paths behind `lora_unet_` and `lora_te_`, a scalar `.alpha` for each module."""

    name = "kohya"
    title = "kohya / sd-scripts"

    def detects(self, keys: Iterable[str]) -> int:
        return sum(bool(_PREFIX.match(key) and split_key(key)) for key in keys)

    def bases(self, names: ModelNames) -> Mapping[str, Parts]:
        namings = [diffusers_places(names), original_places(names)]
        if names.kohya_naming == "original":
            namings.reverse()
        bases: dict[str, Parts] = {}
        for prefix in _DENOISER_PREFIXES:
            for places in namings:
                for path, parts in places.items():
                    bases.setdefault(prefix + _flat(path), parts)
        for component in names.text_encoders:
            for prefix in _encoder_prefixes(component, names):
                bases |= {prefix + _flat(path): parts for path, parts in encoder_paths(names, component)}
        return bases

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        return read_tensors(tensors, self.bases(names), names)

    def write(self, state: AdapterState, names: ModelNames) -> dict[str, Tensor]:
        """Adapters that have no exact place under an original name keep diffusers' name, behind `lycoris_`."""
        by_original = names.kohya_naming == "original"

        def base_of(ref: ModuleRef) -> str:
            if ref.component != DENOISER:
                return _encoder_prefixes(ref.component, names)[0] + _flat(ref.path)
            return ("lycoris_" if by_original else "lora_unet_") + _flat(ref.path)

        modules = addressed(state, names, base_of, _original_base if by_original else None)
        return {
            base + suffix: tensor
            for base, module in modules.items()
            for suffix, tensor in spelled(module, KOHYA, norm_names=True).items()
        }

    def header(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        return {}


LAYOUTS.register(KohyaLayout.name)(KohyaLayout())

_DENOISER_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_")
_PREFIX = re.compile(r"lora_unet_|lora_te[123]?_|lora_transformer_|lycoris_")


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _original_base(path: str) -> str:
    return "lora_unet_" + _flat(path)


def _encoder_prefixes(component: str, names: ModelNames) -> tuple[str, ...]:
    """Prefixes of a text encoder's keys, the one to write first."""
    kind = names.encoder_kinds.get(component, "")
    if kind == "t5xxl":
        # OneTrainer counts the encoders of a model; kohya gives T5 the number it has in Stable Diffusion 3.
        return ("lora_te3_", "lora_te2_") if "clip_g" not in names.encoder_kinds.values() else ("lora_te3_",)
    if kind == "clip_g":
        return ("lora_te2_",)
    # Models with a single CLIP have no number, save for transformers, whose first encoder is number one.
    alone = len(names.text_encoders) == 1 and names.peft_prefix == "unet"
    return ("lora_te_", "lora_te1_") if alone else ("lora_te1_", "lora_te_")
