"""The recipe of ComfyUI's node in ComfyUI itself: train on what is on standard input, and write LoRA files.

A child process of `measuring.py`, in ComfyUI's environment. The input is one JSON line: `checkout`, `model` (the file
of the built-in model), `inputs` (safetensors with `latents` as the denoiser gets them and `context`), `settings`, and
`files`, the file to write for each number of steps. ComfyUI saves at the end alone, so each number is a run of its own;
the seed and the constant rate make the shorter ones beginnings of the longest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "peers"))

import comfyui_headless

_SCALE = 0.18215  # of the latents of Stable Diffusion 1, by which the node multiplies


def main() -> None:
    given = json.loads(sys.stdin.readline())
    comfyui_headless.boot(Path(given["checkout"]))
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    inputs = load_file(given["inputs"])
    for steps, file in given["files"].items():
        lora = _trained(_model(Path(given["model"])), inputs, given["settings"] | {"steps": int(steps)})
        save_file({name: tensor.contiguous() for name, tensor in lora.items()}, file)


def _model(file: Path) -> Any:
    """The built-in model: a Stable Diffusion 1 that is narrower, and predicts v."""
    from comfy import model_base, supported_models

    kind = supported_models.SD15
    kind.unet_config = {**kind.unet_config, "context_dim": 128}
    kind.unet_extra_config = {**kind.unet_extra_config, "num_heads": 4}
    kind.model_type = lambda *_: model_base.ModelType.V_PREDICTION
    return comfyui_headless.load_model(file)


def _trained(model: Any, inputs: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    import torch
    from comfy_extras import nodes_train

    torch.manual_seed(settings["seed"])
    every = {
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "rank": 8,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "training_dtype": "bf16",
        "lora_dtype": "bf16",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    } | settings
    positive = [[one[None], {"pooled_output": None}] for one in inputs["context"]]
    output = nodes_train.TrainLoraNode.execute(
        model=[model],
        latents=[{"samples": inputs["latents"] / _SCALE}],
        positive=[positive],
        **{name: [value] for name, value in every.items()},
    )
    lora: dict[str, Any] = output.result[0]
    return lora


if __name__ == "__main__":
    main()
