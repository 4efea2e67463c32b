"""Record weights that comfy-kitchen packed, and what it unpacks them to.

    python tests/peers/record_comfy_kitchen.py --out tests/golden

Needs torch and comfy-kitchen (PyPI). Writes `comfy_kitchen_weights.safetensors`: layers in ComfyUI's spelling, and
under `expected.` the weight of each in fp32. Sizes are no multiples of the tiles in which scales of blocks are stored.
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor
from models import seeded
from packed_files import described
from safetensors.torch import save_file

INT8 = {"format": "int8_tensorwise"}
CASES: dict[str, tuple[str, tuple[int, int], dict[str, Any], dict[str, Any]]] = {
    "fp8_e4m3": ("TensorCoreFP8Layout", (40, 48), {}, {"format": "float8_e4m3fn"}),
    "int8": ("TensorWiseINT8Layout", (40, 48), {}, INT8),
    "int8_rows": ("TensorWiseINT8Layout", (40, 48), {"per_channel": True}, INT8),
    **{
        f"convrot_{group}": (
            "TensorWiseINT8Layout",
            (4, 2 * group),
            {"per_channel": True, "convrot": True, "convrot_groupsize": group},
            {**INT8, "convrot": True, "convrot_groupsize": group},
        )
        for group in (4, 16, 64, 256)
    },
    "nvfp4": ("TensorCoreNVFP4Layout", (144, 96), {}, {"format": "nvfp4"}),
    "mxfp8": ("TensorCoreMXFP8Layout", (160, 96), {}, {"format": "mxfp8"}),
}
"""Layout, size, settings, and what a file says, by name of the layer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the file")
    arguments = parser.parse_args()
    tensors = {}
    for name, (layout, shape, settings, said) in CASES.items():
        packed = QuantizedTensor.from_float(seeded(name, shape, seed=0, std=0.05), layout, **settings)
        parts = packed.state_dict(f"{name}.weight")
        tensors |= {key: tensor.contiguous() for key, tensor in parts.items()}
        tensors |= {f"{name}.comfy_quant": described(**said), f"expected.{name}": packed.dequantize().contiguous()}
    file = arguments.out / "comfy_kitchen_weights.safetensors"
    save_file(tensors, file, {"comfy_kitchen": _version("comfy-kitchen"), "torch": torch.__version__})
    print(f"{file}: {len(CASES)} layers, {file.stat().st_size} bytes")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
