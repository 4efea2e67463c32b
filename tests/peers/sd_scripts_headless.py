"""kohya's sd-scripts from a source checkout: what the peer scripts share.

Its LoRA network (`networks/lora.py`) works on any UNet whose blocks have diffusers' class names. Its helpers import
OpenCV and einops, which nothing here calls: where they are absent, empty stand-ins let the import pass.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


def boot(checkout: Path) -> Any:
    """The module `networks.lora` of a checkout."""
    if not (checkout / "networks" / "lora.py").is_file():
        raise SystemExit(f"{checkout} is not an sd-scripts checkout; give the folder that holds networks/ and library/")
    sys.path.insert(0, str(checkout))
    for name, attribute in (("cv2", None), ("einops", "rearrange")):
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            if attribute is not None:
                setattr(module, attribute, None)
            sys.modules[name] = module
    return importlib.import_module("networks.lora")
