"""Time our training on the work of `comfyui_train.py`, and print one JSON line of the same fields.

The checkpoint, latents and captions are those of `tests/peers/models.py`, from the same seeds; every Linear and
convolution is trained with rank 8, alpha 1 and a down matrix of zeros, norms and biases as differences, in bf16 with
AdamW at 5e-4 and the loss on the clean picture.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "peers"))

import models
from comfyui_train import MB, MODELS, TOKENS, Meter
from safetensors.torch import save_file

from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.placement import dtype_from_name
from lorasmith.data.dataset import Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, StepDone
from lorasmith.training.job import engine_of, plan_job
from lorasmith.training.loop import Loop, Watcher


class _Steps(Watcher):
    """Calls the meter at the end of each step."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def due(self, loop: Loop) -> bool:
        self._meter()
        return False


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    shape = MODELS[settings["model"]]
    weights = models.checkpoint(shape, settings["seed"])
    weights_mb = sum(tensor.nbytes for tensor in weights.values()) / MB
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(weights, str(file))
        del weights
        gc.collect()
        keep_freed_memory()  # from here on, so that the memory for making the checkpoint is not counted
        device, meter = torch.device(settings["device"]), Meter(settings["warmup"], settings["device"])
        before_mb = meter.memory_mb("VmRSS")
        # ComfyUI's loader chooses its compute dtype; ours takes it as an argument.
        denoiser = load_model(str(file), dtype=dtype_from_name(settings["dtype"])).denoiser
        config = TrainConfig(
            steps=settings["warmup"] + settings["steps"],
            batch_size=settings["batch"],
            rank=settings["rank"],
            alpha=1.0,
            zero_init="down",
            targets="all",
            differences=settings["differences"],
            learning_rate=5e-4,
            objective="x0",
            training_dtype=settings["dtype"],
            gradient_checkpointing=settings["checkpointing"],
            seed=settings["seed"],
        )
        job = plan_job(denoiser, config, device)
        losses: list[float] = []

        def note(event: Event) -> None:
            if isinstance(event, StepDone):
                losses.append(event.loss)

        engine = engine_of(job)
        Loop(engine, _samples(shape, settings), on_event=note, watchers=[_Steps(meter)]).run()
        engine.release()
    figures = meter.figures() | {
        "weights_mb": round(weights_mb, 1),
        "peak_above_mb": round(meter.peak_mb - before_mb - weights_mb, 1),
        "peak_mb": round(meter.peak_mb, 1),
        "loss": [round(loss, 6) for loss in losses],
    }
    print(json.dumps({"trainer": "lorasmith", "torch": torch.__version__} | settings | figures))


def _samples(shape: models.UNetShape | models.FluxShape, settings: dict[str, Any]) -> list[Sample]:
    count, size, seed = max(4, settings["batch"]), settings["latent_size"], settings["seed"]
    latents = models.seeded("latents", (count, shape.latent_channels, size, size), seed=seed)
    tensors = {"context": models.seeded("context", (count, TOKENS, shape.context), seed=seed)}
    if isinstance(shape, models.FluxShape):
        tensors["pooled"] = models.seeded("pooled", (count, shape.pooled), seed=seed)
        tensors["guidance"] = torch.full((count,), 3.5)
    return [
        Sample(latents[i], Conditioning({name: one[i : i + 1] for name, one in tensors.items()}), f"{i}")
        for i in range(count)
    ]


if __name__ == "__main__":
    main()
