"""A ComfyUI checkout without a GPU, and MODELs of random weights that its own detection makes of their tensors."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
PACK = Path(__file__).resolve().parents[1]


def boot(checkout: Path) -> None:
    """Make a checkout importable, on the CPU, with the attention that users of a GPU get.

    Its folders of outputs and temporary files are elsewhere until the process ends, so nothing is left in it.
    """
    folder = tempfile.mkdtemp(prefix="lorasmith-proof-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention", "--base-directory", folder]
    if importlib.util.find_spec("torchaudio") is None:  # only nodes of sound need it
        for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
            module: Any = types.ModuleType(name)
            module.__path__, module.__spec__, module.MelScale = [], ModuleSpec(name, None), None
            sys.modules[name] = module
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    torch.set_num_threads(1)


def pack() -> Any:
    """The pack, imported as ComfyUI imports a folder of custom_nodes."""
    spec = importlib.util.spec_from_file_location("lorasmith_pack", PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lorasmith_pack"] = module
    spec.loader.exec_module(module)
    return module
