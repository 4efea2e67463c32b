"""Denoisers in a single file under diffusers' names, as ComfyUI's loaders take them too.

A family's table of its released model gives each tensor its original name, so that the family recognises the file and
finds its configuration as it does for an original one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import nn

from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.files.checkpoint import Shapes

__all__ = ["recognised_by_diffusers_names"]

_SIGNS = ("transformer_blocks.", "single_transformer_blocks.", "all_x_embedder.", "down_blocks.")


def recognised_by_diffusers_names(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Family, Shapes] | None:
    """The family of a denoiser, and its shapes by original names; None if no family has these names.

    Args:
        shapes: of the tensors, by diffusers' names.
    """
    if not any(name.startswith(_SIGNS) for name in shapes):
        return None
    for _, family in FAMILIES.items():
        if family.released is None:
            continue
        original = _original_shapes(family, _released(family), shapes)
        if original is not None and family.recognises(original):
            return family, original
    return None


@cache
def _released(family: Family) -> nn.Module:
    """The released denoiser of a family, without weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return family.denoiser_class()(**(family.released or {}))


def _original_shapes(family: Family, released: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Shapes | None:
    """Shapes by original names; None if a tensor is not one of the family's."""
    table, original = family.table(released), Shapes()
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        place = table.get(path)
        if place is None:
            return None
        key = ".".join(filter(None, (place.path, place.parameters.get(leaf, leaf))))
        rows = original[key][0] if key in original else 0
        original[key] = (rows + shape[0], *shape[1:])
    return original
