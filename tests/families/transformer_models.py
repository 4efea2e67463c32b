"""The small random models of the transformer families, and what is loaded from their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_flux import FLUX1
from tiny_flux2 import DEV, KLEIN
from tiny_krea2 import KREA2
from tiny_parts import TinyFamily
from tiny_wan import WAN, WAN_5B
from tiny_z_image import Z_IMAGE

from lorasmith.families.model import Model

__all__ = ["TINY", "Case"]


@dataclass(frozen=True)
class Case:
    """A family: its small model, the files of it, and what we load from them."""

    name: str
    tiny: TinyFamily
    files: Mapping[str, Path]
    ours: Model

    @classmethod
    def of(cls, name: str, folder: Path) -> Case:
        files = TINY[name].saved(folder)
        return cls(name, TINY[name], files, TINY[name].loaded(files))

    def skip(self, test: str) -> None:
        """Skip a test that this family leaves out, for its reason."""
        if test in self.tiny.left_out:
            pytest.skip(self.tiny.left_out[test])


TINY: dict[str, TinyFamily] = {
    "flux1": FLUX1,
    "z-image": Z_IMAGE,
    "flux2-klein": KLEIN,
    "flux2": DEV,
    "krea2": KREA2,
    "wan": WAN,
    "wan22-5b": WAN_5B,
}
"""Small models by the name of their family."""
