"""Names of the released models that most LoRAs are for, so that files of different layouts can be matched without one.

The architectures are built on the meta device from the published settings, which takes a second and no memory for
weights.
"""

from __future__ import annotations

from functools import cache

from lorasmith.families import loading  # noqa: F401  registers the families
from lorasmith.families.base import FAMILIES
from lorasmith.formats.names.model_names import ModelNames

__all__ = ["released_names"]


@cache
def released_names(title: str) -> ModelNames | None:
    """The name table of a family's released model.

    Args:
        title: display name of the family (`Family.title`).

    Returns:
        The table, None for unsupported families.
    """
    family = next((one for _, one in FAMILIES.items() if one.title == title), None)
    if family is None or family.released is None:
        return None
    return family.names(family.released_denoiser(), {})
