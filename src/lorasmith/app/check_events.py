"""The event of a checked folder, for doors that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasmith.training.events import Event

if TYPE_CHECKING:
    from lorasmith.app.data_check import DataCheck

__all__ = ["ImagesChecked"]


@dataclass(frozen=True, kw_only=True)
class ImagesChecked(Event):
    """The images of a run were checked, before any is encoded.

    Attributes:
        check: the checked folder.
    """

    check: DataCheck
