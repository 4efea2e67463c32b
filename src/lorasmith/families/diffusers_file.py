"""Denoisers in a single file under diffusers' names, as ComfyUI's loaders take them too.

A family's table of its released model gives each tensor its original name, so that the family recognises the file and
finds its configuration as it does for an original one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.files.checkpoint import Shapes
from lorasmith.formats.names.model_names import OriginalName

__all__ = ["original_shapes", "recognised_by_diffusers_names"]

_SIGNS = (
    *("transformer_blocks.", "single_transformer_blocks.", "all_x_embedder.", "down_blocks."),
    *("time_caption_embed.", "condition_embedder."),
)


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
        original = original_shapes(_released_table(family), shapes)
        if original is not None and family.recognises(original):
            return family, original
    return None


@cache
def _released_table(family: Family) -> Mapping[str, OriginalName]:
    return family.table(family.released_denoiser())


def original_shapes(table: Mapping[str, OriginalName], shapes: Mapping[str, tuple[int, ...]]) -> Shapes | None:
    """Shapes of a denoiser's tensors by original names; None if a tensor is not in the table.

    Args:
        table: of its family (`Family.table`).
        shapes: by diffusers' names.
    """
    original = Shapes()
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        place = table.get(path)
        if place is None:
            return None
        key = place.tensor(leaf)
        rows = original[key][0] if key in original else 0
        original[key] = (rows + shape[0], *shape[1:])
    return original
