"""The pack on the stand-in of ComfyUI's interfaces."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def pack() -> Iterator[Any]:
    stand_in = pytest.importorskip("stand_in", reason="the pack is not part of a source distribution")
    import checkout  # beside the stand-in

    before = set(sys.modules)
    stand_in.install()
    yield checkout.pack()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("comfy", "comfy_extras", "comfyui_version", "folder_paths", "lorasmith_pack"):
            del sys.modules[name]


@pytest.fixture
def comfy_model(pack: Any) -> Any:
    return sys.modules["lorasmith_pack.comfy_model"].ComfyModel
