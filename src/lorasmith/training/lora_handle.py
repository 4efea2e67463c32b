"""A LoRA in memory, from training or from a file (ComfyUI's LORA_MODEL)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lorasmith.adapters.packed_layers import packed_layers
from lorasmith.adapters.patch import Patch, cannot_merge
from lorasmith.core.adapter_state import DENOISER, AdapterState
from lorasmith.core.errors import LoraError
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.formats.lora_file import PORTABLE, load_lora, save_lora
from lorasmith.formats.names.model_names import ModelNames

__all__ = ["Lora"]


@dataclass(frozen=True)
class Lora:
    """A LoRA with the name table of its model.

    Attributes:
        state: tensors and metadata.
        names: name table of its model.
        dtype: number format of the saved file, None to keep each tensor's own.
        private: whether a graph that saves it leaves the workflow out of the file.
    """

    state: AdapterState
    names: ModelNames
    dtype: torch.dtype | None = None
    private: bool = False

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model | ModelNames) -> Lora:
        """Load a LoRA file or folder in any known layout, for a model or its names. Raises LoraError."""
        names = model if isinstance(model, ModelNames) else model.names
        return cls(load_lora(Path(path), names), names)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        layout: str = PORTABLE,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the file atomically, with `metadata` added to its own. Raises LoraError and OutputError."""
        target = Path(path)
        state = self.state.with_metadata(metadata or {})
        save_lora(target, state, self.names, layout=layout, dtype=self.dtype, metadata=state.metadata)
        return target

    def applied_to(self, denoiser: Denoiser, *, strength: float = 1.0, bypass: bool | None = None) -> Denoiser:
        """The denoiser with this LoRA on top; strength 0 is the denoiser itself.

        Args:
            denoiser: what it is applied to.
            strength: factor of the weight change; 1 is as trained.
            bypass: whether it runs beside the weights instead of being merged into them; None merges it unless one of
                those weights is packed.

        Raises:
            LoraError: the LoRA belongs to another model, or would have to be merged into packed weights.
        """
        if strength == 0:
            return denoiser
        self._check_fits(denoiser.base)
        patch = self._patch(DENOISER, strength=strength, bypass=bool(bypass))
        changed = {*patch.adapters, *(path for path, one in patch.differences.items() if "weight" in one)}
        if not bypass and changed & packed_layers(denoiser.module).keys():
            if bypass is not None:
                raise LoraError(cannot_merge(denoiser.module))
            patch = replace(patch, bypass=True)
        return denoiser.patched(patch)

    def applied_to_text(self, encoder: TextEncoder, *, strength: float = 1.0) -> TextEncoder:
        """The text encoders with this LoRA on top, if it has layers for them."""
        if strength == 0:
            return encoder
        for component, module in encoder.encoders.modules.items():
            patch = self._patch(component, strength=strength, bypass=False)
            if patch.adapters or patch.differences:
                encoder = encoder.patched(component, _as_loaded(patch, module))
        return encoder

    def _check_fits(self, base: Model) -> None:
        """Refuse a model whose adapted layers are not those of the model that this LoRA was made for."""
        ours, theirs = self.names, base.names
        if ours is theirs:
            return
        paths = [ref.path for ref in self.state.adapters if ref.component == DENOISER]
        misfits = [path for path in paths if ours.weight_shapes.get(path) != theirs.weight_shapes.get(path)]
        if ours.family != theirs.family or misfits:
            where = f", whose {misfits[0]} has another shape or is missing" if misfits else ""
            raise LoraError(
                f"a LoRA must be applied to the kind of model that it was made for ({ours.family}), "
                f"got {base.title} ({theirs.family}){where}; load a model of that kind"
            )

    def _patch(self, component: str, *, strength: float, bypass: bool) -> Patch:
        return Patch(
            adapters={ref.path: one for ref, one in self.state.adapters.items() if ref.component == component},
            differences={ref.path: one for ref, one in self.state.differences.items() if ref.component == component},
            strength=strength,
            bypass=bypass,
        )


def _as_loaded(patch: Patch, module: nn.Module) -> Patch:
    """A text encoder's patch under the module paths of the installed transformers (files have `text_model.`)."""
    present = dict(module.named_modules())

    def path(written: str) -> str:
        return written if written in present else written.removeprefix("text_model.")

    return replace(
        patch,
        adapters={path(written): one for written, one in patch.adapters.items()},
        differences={path(written): one for written, one in patch.differences.items()},
    )
