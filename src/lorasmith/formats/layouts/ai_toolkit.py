"""ai-toolkit's layout: `diffusion_model.<path>.lora_A.weight` and `.lora_B.weight`, alpha multiplied in.

Paths are diffusers' or the original checkpoint's, by family (`ModelNames.ai_toolkit_naming`). Without `.alpha` tensors,
which some of diffusers' loaders refuse and others ignore, it is the layout that ComfyUI, diffusers and the trainers of
newer families all read. Algorithms other than LoRA keep LyCORIS' names and alphas after the same paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.formats.layouts.comfy import AI_TOOLKIT_SUFFIX, comfyui_bases
from lorasmith.formats.layouts.layout import LAYOUTS, Layout
from lorasmith.formats.names.model_names import ModelNames
from lorasmith.formats.names.places import Parts, addressed, read_tensors
from lorasmith.formats.names.recognise import COMFYUI_PREFIXES
from lorasmith.formats.names.spelling import KOHYA, PEFT, ModuleTensors, spelled, without_core
from lorasmith.formats.scales import baked

_PREFIX = COMFYUI_PREFIXES[0]


class AiToolkitLayout(Layout):
    """ComfyUI's prefix with PEFT's names of the factors."""

    name = "ai-toolkit"
    title = "ai-toolkit"

    def detects(self, keys: Iterable[str]) -> int:
        return sum(key.startswith(COMFYUI_PREFIXES) and bool(AI_TOOLKIT_SUFFIX.search(key)) for key in keys)

    def bases(self, names: ModelNames) -> Mapping[str, Parts]:
        return comfyui_bases(names)

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: ModelNames) -> AdapterState:
        return read_tensors(tensors, self.bases(names), names)

    def write(self, state: AdapterState, names: ModelNames) -> dict[str, Tensor]:
        """Adapters that have no exact place under an original name keep diffusers' name, after PEFT's prefix."""
        by_original = names.ai_toolkit_naming == "original"

        def base_of(ref: ModuleRef) -> str:
            if ref.component != DENOISER:
                return f"text_encoders.{names.text_encoders[ref.component].comfyui[0]}.transformer.{ref.path}"
            return ".".join(names.pipeline_place(ref.path)) if by_original else _PREFIX + ref.path

        modules = addressed(state, names, base_of, _original_base if by_original else None)
        return {
            base + suffix: tensor for base, module in modules.items() for suffix, tensor in _spelled(module).items()
        }

    def header(self, state: AdapterState, names: ModelNames) -> dict[str, str]:
        return {}


LAYOUTS.register(AiToolkitLayout.name)(AiToolkitLayout())


def _original_base(path: str) -> str:
    return _PREFIX + path


def _spelled(module: ModuleTensors) -> dict[str, Tensor]:
    """A LoRA in PEFT's spelling without alpha; anything more in LyCORIS'."""
    weights = None if module.adapter is None else without_core(module.adapter)
    if weights is None or not format_of(weights).is_low_rank or "dora_scale" in weights.tensors:
        return spelled(module, KOHYA)
    return spelled(replace(module, adapter=baked(weights)), PEFT, alpha=False)
