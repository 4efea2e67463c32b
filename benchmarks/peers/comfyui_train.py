"""Time ComfyUI's own Train LoRA on a random-weight model, and print one JSON line; `comfyui.py` compares.

    python benchmarks/peers/comfyui_train.py --comfyui PATH/TO/ComfyUI --model sd15
    python benchmarks/peers/comfyui_train.py --comfyui PATH/TO/ComfyUI --model flux-small --batch 4 --mode bypass
    python benchmarks/peers/comfyui_train.py --comfyui PATH/TO/ComfyUI --model sd1-tiny --steps 3 --latent-size 8

Defaults are the node's own: weight mode, bf16, rank 8, AdamW at 5e-4, gradient checkpointing at depth 1, every module
trained. Weights, latents, captions and their seeds come from `tests/peers/models.py`, so that another trainer can be
given the very same work; attention is torch's, as on a GPU. Flux needs checkpointing (its residuals are added in
place, which autograd refuses otherwise).

Numbers printed
    step_s             median seconds per step: on the CPU those of the processor, steadier than wall time on a shared
                       machine; on a GPU wall time up to when the device is done
    step_wall_s        median wall seconds per step
    weights_mb         the model's weights, once, in the dtype of the checkpoint
    peak_above_mb      peak resident memory during the measured steps, less what the process held before it loaded the
                       model, less `weights_mb`: second copies of the weights count, the program itself does not
                       (but for some 200 MB that torch allocates in its first steps); on a GPU the allocator's peak
    loss               of each step, warm-up included
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "peers"))

import comfyui_headless
import models

MODELS = {
    "sd15": models.SD1_FULL,
    "sd1-tiny": models.SD1_TINY,
    "flux-small": models.FLUX_SMALL,
    "flux-tiny": models.FLUX_TINY,
}
TOKENS = 77
MB = 2**20


def main() -> None:
    arguments = _arguments()
    comfyui_headless.boot(arguments.comfyui, arguments.device)
    import comfy.utils
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(arguments.threads)
    shape = MODELS[arguments.model]
    weights = models.checkpoint(shape, arguments.seed, getattr(torch, arguments.weights))
    weights_mb = sum(tensor.nbytes for tensor in weights.values()) / MB
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(weights, str(file))
        del weights
        gc.collect()
        meter = Meter(arguments.warmup, arguments.device)
        before_mb = meter.memory_mb("VmRSS")
        patcher = comfyui_headless.load_model(file)
        comfy.utils.set_progress_bar_global_hook(meter)
        losses = _train(patcher, shape, arguments)
    settings = {key: value for key, value in vars(arguments).items() if key != "comfyui"}
    figures = meter.figures() | {
        "weights_mb": round(weights_mb, 1),
        "peak_above_mb": round(meter.peak_mb - before_mb - weights_mb, 1),
        "peak_mb": round(meter.peak_mb, 1),
        "loss": [round(loss, 6) for loss in losses],
    }
    versions = {"comfyui": comfyui_headless.version(), "torch": torch.__version__}
    print(json.dumps({"trainer": "comfyui"} | settings | versions | figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI checkout")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--weights", choices=("float32", "float16", "bfloat16"), default="float32", help="of the file")
    parser.add_argument("--mode", choices=("weight", "bypass"), default="weight")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of training and of the LoRA")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--latent-size", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--steps", type=int, default=6, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.warmup < 1:
        parser.error("--warmup must be at least 1: the first step's start is not seen")
    return arguments


class Meter:
    """ComfyUI's progress hook, which fires at the end of each step: notes the clocks, and peak memory after warm-up.

    Args:
        warmup: steps that are not measured.
        device: `cpu` or `cuda`.
    """

    def __init__(self, warmup: int, device: str = "cpu") -> None:
        self._warmup = warmup
        self._on_gpu = device != "cpu"
        self._clocks: dict[str, list[float]] = {"cpu": [], "wall": []}
        self.peak_mb = 0.0

    def __call__(self, *_: Any, **__: Any) -> None:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        self._clocks["cpu"].append(time.process_time())
        self._clocks["wall"].append(time.perf_counter())
        if len(self._clocks["wall"]) == self._warmup:
            if self._on_gpu:
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
        self.peak_mb = self.memory_mb("VmHWM")

    def figures(self) -> dict[str, float]:
        """Medians of the steps behind the warm-up."""
        return {"step_s": self._median("wall" if self._on_gpu else "cpu"), "step_wall_s": self._median("wall")}

    def memory_mb(self, field: str) -> float:
        """Resident memory now (VmRSS) or at the most (VmHWM), in MiB; on a GPU the allocator's."""
        if self._on_gpu:
            import torch

            return (torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()) / MB
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
        raise SystemExit(f"/proc/self/status has no {field}; memory can be measured on Linux only")

    def _median(self, clock: str) -> float:
        ends = self._clocks[clock][self._warmup - 1 :]
        return round(statistics.median(after - before for before, after in itertools.pairwise(ends)), 4)


def _train(patcher: Any, shape: models.UNetShape | models.FluxShape, arguments: argparse.Namespace) -> list[float]:
    """Run the node; one picture per place in the batch, four at least. Returns the losses."""
    import torch
    from comfy_extras.nodes_train import TrainLoraNode

    count = max(4, arguments.batch)
    size = arguments.latent_size
    latents = models.seeded("latents", (count, shape.latent_channels, size, size), seed=arguments.seed)
    context = models.seeded("context", (count, TOKENS, shape.context), seed=arguments.seed)
    extra: list[dict[str, Any]] = [{} for _ in range(count)]
    if isinstance(shape, models.FluxShape):
        pooled = models.seeded("pooled", (count, shape.pooled), seed=arguments.seed)
        extra = [{"pooled_output": pooled[i : i + 1], "guidance": 3.5} for i in range(count)]
    settings = {
        "batch_size": arguments.batch, "steps": arguments.warmup + arguments.steps, "grad_accumulation_steps": 1,
        "learning_rate": 5e-4, "rank": arguments.rank, "optimizer": "AdamW", "loss_function": "MSE",
        "seed": arguments.seed, "training_dtype": arguments.dtype, "lora_dtype": arguments.dtype,
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": arguments.checkpointing,
        "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
        "bypass_mode": arguments.mode == "bypass",
    }  # fmt: skip
    torch.manual_seed(arguments.seed)
    output = TrainLoraNode.execute(
        model=[patcher],
        latents=[{"samples": latents}],
        positive=[[[context[i : i + 1], extra[i]] for i in range(count)]],
        **{name: [value] for name, value in settings.items()},
    )
    losses: list[float] = output.result[1]["loss"]
    return losses


if __name__ == "__main__":
    main()
