"""ComfyUI from a source checkout, without server or browser: what the peer scripts share.

Facts about the checkout that these functions deal with (ComfyUI 0.33):

- Its command line is parsed when `comfy.options` says so, from `sys.argv`; `--cpu` must be there before anything else
  of it is imported.
- Without torchaudio nothing imports, although only audio nodes use it; an empty stand-in is enough.
- The training node clones a model by loading its file again, so a model has to come from a file.
- A UNet is taken for Stable Diffusion 1.x when its context is 768 wide and its first level 320, for XL when its context
  is 2048 wide and its first level 320. A narrower one is taken by that name once the expected width is changed; nothing
  else depends on it.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

if TYPE_CHECKING:
    from torch import Tensor


def booted(description: str | None, **more: dict[str, Any]) -> argparse.Namespace:
    """Arguments of a recorder, after ComfyUI is booted: `more` are those that it has beside a checkout and `--out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI checkout")
    parser.add_argument("--commit", default="unknown", help="commit of the checkout, for the record")
    parser.add_argument("--out", type=Path, required=True)
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    arguments = parser.parse_args()
    boot(arguments.comfyui)
    return arguments


def boot(checkout: Path, device: str = "cpu") -> None:
    """Make `comfy` importable, on the CPU or the first GPU, with torch's own attention."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    if not (checkout / "comfy" / "sd.py").is_file():
        raise SystemExit(f"{checkout} is not a ComfyUI checkout; give the folder that holds comfy/ and main.py")
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0], *(["--cpu"] if device == "cpu" else []), "--use-pytorch-cross-attention"]
    if importlib.util.find_spec("torchaudio") is None:
        _stand_in_for_torchaudio()
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False


def version() -> str:
    """Version of the booted checkout."""
    import comfyui_version

    return str(comfyui_version.__version__)


def load_model(checkpoint: Path, dtype: Any = None) -> Any:
    """ComfyUI's ModelPatcher of a checkpoint file in the original layout, weights in `dtype` (default: its choice)."""
    import comfy.sd
    import comfy.supported_models

    width = _unet_width(checkpoint)
    if width is not None:
        for table in (comfy.supported_models.SD15, comfy.supported_models.SDXL):
            table.unet_config = {**table.unet_config, "model_channels": width}
    options = {} if dtype is None else {"dtype": dtype}
    return comfy.sd.load_diffusion_model(str(checkpoint), model_options=options)


def denoise(
    denoiser: Any,
    *,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    pooled: Tensor | None = None,
    guidance: Tensor | None = None,
    time_ids: Tensor | None = None,
    t5xxl_ids: Tensor | None = None,
    t5xxl_weights: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """What the bare network answers: epsilon for Stable Diffusion (timestep 0..999), flow for others (timestep sigma).

    Args:
        denoiser: `load_model(...).model.diffusion_model`.
        x: (batch, channels, [frames,] height, width) as the network sees it.
        timestep: (batch,).
        context: (batch, tokens, width).
        pooled: (batch, width), Flux and Stable Diffusion XL.
        guidance: (batch,), Flux alone.
        time_ids: (batch, 6) sizes and crop, Stable Diffusion XL alone.
        t5xxl_ids, t5xxl_weights: (batch, T5 tokens), Anima alone.
        known: (batch, channels, [frames,] height, width) beside x, Flux.1 Fill and Wan's image to video alone.
    """
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

    extra: dict[str, Any] = {} if pooled is None else {"y": pooled, "guidance": guidance}
    if type(denoiser).__name__ == "NextDiT":  # Z-Image: as comfy.model_base.Lumina2.extra_conds counts them
        extra["num_tokens"] = context.shape[1]
    if type(denoiser).__name__ == "Chroma":  # without guidance in the conditioning
        extra["guidance"] = torch.zeros(len(x))
    if time_ids is not None:  # as comfy.model_base.SDXL.encode_adm puts them together
        extra = {"y": torch.cat((pooled, Timestep(256)(time_ids.flatten()).reshape(len(x), -1)), dim=1)}
    if t5xxl_ids is not None and t5xxl_weights is not None:  # as comfy.model_base.Anima.extra_conds shapes them
        extra = {"t5xxl_ids": t5xxl_ids, "t5xxl_weights": t5xxl_weights.unsqueeze(-1)}
    if known is not None:
        x = torch.cat((x, known), dim=1)
    elif type(denoiser).__name__ == "HunyuanVideo":  # as comfy.model_base.HunyuanVideo15.concat_cond fills the channels
        x = torch.cat((x, x.new_zeros(len(x), denoiser.in_channels - x.shape[1], *x.shape[2:])), dim=1)
    with torch.no_grad():
        output: Tensor = denoiser(x.clone(), timestep, context=context, **extra)
    return output


def _unet_width(checkpoint: Path) -> int | None:
    with safe_open(str(checkpoint), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            if key.endswith("input_blocks.0.0.weight"):
                return int(file.get_slice(key).get_shape()[0])
    return None


def _stand_in_for_torchaudio() -> None:
    for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules["torchaudio.transforms"].MelScale = None  # type: ignore[attr-defined]
