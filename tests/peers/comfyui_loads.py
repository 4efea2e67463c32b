"""Load LoRAs with ComfyUI's own code and compare what the denoiser answers.

    python tests/peers/comfyui_loads.py --comfyui PATH/TO/ComfyUI --checkpoint MODEL.safetensors LORA=REFERENCE ...

MODEL is a UNet of Stable Diffusion 1.x or XL of any width, a transformer of any width (`comfyui_small.py`), or whatever
ComfyUI detects. Layers of text encoders
that a LoRA has something for are counted, and not run. The rest, and what is printed, is described in `load_report.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfyui_headless
import comfyui_small
from load_report import Loaded, base_of, parser, run


def main() -> None:
    arguments = parser(__doc__, "comfyui").parse_args()
    comfyui_headless.boot(arguments.comfyui)
    import torch

    with comfyui_small.taken_small():
        patcher = comfyui_headless.load_model(arguments.checkpoint, torch.float32)
    run(arguments, lambda lora, inputs: _loaded(patcher, lora, inputs))


def _loaded(patcher: Any, lora: Path, inputs: dict[str, Any]) -> Loaded:
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_management
    from safetensors.torch import load_file

    without = comfyui_headless.denoise(patcher.model.diffusion_model, **inputs)
    tensors = comfy.lora_convert.convert_lora(load_file(str(lora)))
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    encoder = _clip(patcher) if any(key.startswith(("lora_te", "text_encoder")) for key in tensors) else None
    if encoder is not None:
        names = comfy.lora.model_lora_keys_clip(encoder, names)
    listener = _NotLoaded()
    logging.getLogger().addHandler(listener)
    try:
        patches = comfy.lora.load_lora(tensors, names)
        patched = patcher.clone()
        taken = set(patched.add_patches(patches, 1.0))
        taken |= set() if encoder is None else {key for key in patches if key in encoder.state_dict()}
        comfy.model_management.load_models_gpu([patched])
        output = comfyui_headless.denoise(patched.model.diffusion_model, **inputs)
    finally:
        logging.getLogger().removeHandler(listener)
        comfy.model_management.unload_all_models()
    modules = {base_of(key) for key in tensors}
    failed = {base_of(key) for key in listener.keys} | {str(key) for key in patches if key not in taken}
    return Loaded(modules, failed, output, without)


def _clip(patcher: Any) -> Any:
    """The text encoders of Stable Diffusion 1.x or XL, for the names that LoRAs may give their layers."""
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import torch

    is_xl = type(patcher.model).__name__ == "SDXL"
    kind = comfy.sdxl_clip.SDXLClipModel if is_xl else comfy.sd1_clip.SD1ClipModel
    return kind(device="cpu", dtype=torch.float32)


class _NotLoaded(logging.Handler):
    """Collects the keys that ComfyUI says it did not load, or could not merge: it raises for neither."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.keys: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("lora key not loaded: "):
            self.keys.append(message.removeprefix("lora key not loaded: "))
        elif record.levelno >= logging.ERROR:
            self.keys.append(message.split(":")[0])


if __name__ == "__main__":
    main()
