"""Names of the released models that most LoRAs are for, so that files of different layouts can meet without one.

The architectures are built on the meta device from the settings that their publishers chose, which takes a second and
no memory for weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from lorasmith.families import loading  # noqa: F401  registers the families
from lorasmith.families.base import FAMILIES
from lorasmith.formats.names.model_names import ModelNames

__all__ = ["released_names"]


@cache
def released_names(title: str) -> ModelNames | None:
    """The name table of a family's released model.

    Args:
        title: what people call the family, as `formats.names.recognise` and `Family.title` have it.

    Returns:
        None for families that are not known here.
    """
    found = next(((name, family) for name, family in FAMILIES.items() if family.title == title), None)
    if found is None or found[0] not in _RELEASED:
        return None
    import diffusers
    from accelerate import init_empty_weights

    name, family = found
    kind, settings = _RELEASED[name]
    with init_empty_weights():
        denoiser = getattr(diffusers, kind)(**settings)
    return family.names(denoiser, {})


_UNET = {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}
_HEADS = {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_RELEASED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sd1": ("UNet2DConditionModel", {**_UNET, "cross_attention_dim": 768}),
    "sd2": ("UNet2DConditionModel", {**_UNET, **_HEADS, "cross_attention_dim": 1024}),
    "flux1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
}
"""Family → class in diffusers and its settings. Families know the paths of the released text encoders by themselves."""
