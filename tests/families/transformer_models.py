"""The small random models of the transformer families, and what is loaded from their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tiny_anima import ANIMA
from tiny_chroma import CHROMA
from tiny_ernie_image import ERNIE_IMAGE
from tiny_flux import FLUX1
from tiny_flux2 import DEV, KLEIN
from tiny_hunyuan_video15 import HUNYUAN_VIDEO15
from tiny_ideogram4 import IDEOGRAM4
from tiny_krea2 import KREA2
from tiny_lumina2 import LUMINA2
from tiny_parts import TinyFamily
from tiny_qwen_image import QWEN_IMAGE
from tiny_qwen_image21 import QWEN_IMAGE21
from tiny_sd3 import SD3
from tiny_wan import WAN, WAN_5B, WAN_I2V
from tiny_z_image import Z_IMAGE

from lorasmith.families.model import Model


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
            import pytest  # recorders of ComfyUI's numbers read this file where it is not installed

            pytest.skip(self.tiny.left_out[test])


TINY: dict[str, TinyFamily] = {
    "flux1": FLUX1,
    "z-image": Z_IMAGE,
    "flux2-klein": KLEIN,
    "flux2": DEV,
    "krea2": KREA2,
    "ideogram4": IDEOGRAM4,
    "ernie-image": ERNIE_IMAGE,
    "anima": ANIMA,
    "sd3": SD3,
    "lumina2": LUMINA2,
    "qwen-image": QWEN_IMAGE,
    "qwen-image-2.1": QWEN_IMAGE21,
    "chroma": CHROMA,
    "wan": WAN,
    "wan-i2v": WAN_I2V,
    "wan22-5b": WAN_5B,
    "hunyuan-video15": HUNYUAN_VIDEO15,
}
"""Small models by the name of their family."""
