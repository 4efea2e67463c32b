"""Parts of graphs in API format that tests share, and their execution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from lorasmith.core.folders import Folders
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Denoiser
from lorasmith.nodes import load_nodes
from lorasmith.workflow import Executor, validate
from lorasmith.workflow.execution_events import Event

Prompt = dict[str, dict[str, Any]]


def api(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def run(base: Path, prompt: Prompt, events: list[Event] | None = None) -> dict[str, Any]:
    """The outputs of the nodes, by their ids."""
    load_nodes()
    folders = Folders(base)
    executor = Executor(folders, on_event=(events if events is not None else []).append)
    return {key: result.outputs for key, result in executor.run(validate(prompt, folders)).items()}


def pictures_in(base: Path, **sizes: tuple[int, int]) -> None:
    """Pictures a.png and b.png with captions in folders of the input, by the name and the (width, height) of each."""
    rng = np.random.default_rng(0)
    for place, (width, height) in sizes.items():
        folder = base / "input" / place
        folder.mkdir(parents=True)
        for name in "ab":
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(f"make it {name}")


def predicted_with(monkeypatch: pytest.MonkeyPatch) -> list[Conditioning]:
    """The conditionings that denoisers are given from now on."""
    seen: list[Conditioning] = []
    predict = Denoiser.predict

    def watched(self: Denoiser, latents: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        seen.append(given)
        return predict(self, latents, time, given)

    monkeypatch.setattr(Denoiser, "predict", watched)
    return seen


def sampled(empty: dict[str, Any], *, model: str = "unet", scheduler: str = "simple", steps: int = 2) -> Prompt:
    """A picture from `positive` and `negative` on an empty latent, decoded by `vae`."""
    return {
        "empty": empty,
        "sampler": api(
            "KSampler",
            model=[model, 0],
            seed=1,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler=scheduler,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            denoise=1.0,
        ),
        "decode": api("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "show": api("PreviewImage", images=["decode", 0]),
    }


def trained(latents: list[Any], positive: list[Any], *, model: str = "unet", **changes: Any) -> dict[str, Any]:
    """Train LoRA for two steps, with every input of ComfyUI's."""
    settings: dict[str, Any] = {
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "steps": 2,
        "learning_rate": 1e-3,
        "rank": 2,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "none",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": True,
        "bypass_mode": False,
    }
    return api("TrainLoraNode", model=[model, 0], latents=latents, positive=positive, **(settings | changes))
