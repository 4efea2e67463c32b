"""LoRAs trained on quantized bases, on the built-in model.

Sixteen pictures of a style, of which four are held out. For every kind of quantization: bytes and error of a weight,
the loss on the held-out pictures before and after training (on the quantized base), and the loss of the LoRA on the
plain model, on all pictures at noise that no run drew. Ratios are to the same run on plain weights.

    python -m benchmarks.quantized_bases --dtype bf16 --seeds 0 1 2
    python -m benchmarks.quantized_bases --kinds none int8 --steps 20 --batch 4
    python -m benchmarks.quantized_bases --kinds none int8 int8_convrot --products --dtype fp32
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.bases import machine
from benchmarks.results import Results, add_json
from lorasmith.adapters.frozen_layer import packable_layers
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.placement import dtype_from_name
from lorasmith.core.quantization import PACKINGS, packed
from lorasmith.core.quantized_products import PRODUCT_KINDS
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import load_dataset
from lorasmith.families.loading import load_model
from lorasmith.families.model import Denoiser, Model
from lorasmith.runs.library import train
from lorasmith.training.config import TrainConfig
from lorasmith.training.engine import batch_maker, sample_losses
from lorasmith.training.job import plan_job


@dataclass(frozen=True)
class Outcome:
    """Losses of a run: held out on its own base before and after it, and of its LoRA on the plain base."""

    before: float
    after: float
    plain: float


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    results = Results(arguments, torch=torch.__version__, machine=machine(device))
    model = load_model("lorasmith-tiny")
    data = load_dataset(BUILT_IN_BASE / "input" / arguments.images, model, device=device)
    columns = {"base": "", "bytes a weight": ".3f", "error (RMS)": ".2%"}
    columns |= dict.fromkeys(("held out, base", "held out", "of plain", "LoRA on plain base", "of plain, on plain"), "")
    results.table(columns)
    reference: list[Outcome] = []
    for kind in ["none", *(kind for kind in arguments.kinds if kind != "none")]:
        size, error = weights_of(model, kind, dtype_from_name(arguments.dtype))
        runs = [outcome(model, data, kind, seed, arguments) for seed in arguments.seeds]
        reference = reference or runs
        results.add(
            kind,
            size,
            error,
            _mean([run.before for run in runs]),
            _mean([run.after for run in runs]),
            _ratio(runs, reference, "after"),
            _mean([run.plain for run in runs]),
            _ratio(runs, reference, "plain"),
        )


def weights_of(model: Model, kind: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes for each weight of Linear layers and convolutions, and their error as a share of their size."""
    size = numbers = 0
    wrong = whole = 0.0
    for layer in packable_layers(model.components.denoiser):
        weight = layer.get_parameter("weight").detach()
        one = packed(weight, kind, dtype)
        size, numbers = size + one.size_bytes, numbers + weight.numel()
        wrong += (one.weight().float() - weight).square().sum().item()
        whole += weight.square().sum().item()
    return size / numbers, (wrong / whole) ** 0.5


def outcome(model: Model, data: EncodedDataset, kind: str, seed: int, arguments: argparse.Namespace) -> Outcome:
    """Train with one kind and one seed."""
    settings: dict[str, Any] = {
        "steps": arguments.steps,
        "batch_size": arguments.batch,
        "rank": arguments.rank,
        "training_dtype": arguments.dtype,
        "products": _format(kind) if arguments.products else "training_dtype",
        "validation_share": 0.25,
        "validation_draws": 16,
        "validate_every": arguments.steps,
    }
    result = train(model, data, quantization=kind, seed=seed, device=arguments.device, **settings)
    assert result.base_loss is not None
    plain = loss_on(result.lora.applied_to(model.denoiser), data, torch.device(arguments.device))
    return Outcome(result.base_loss, result.validations[-1][1], plain)


def _format(kind: str) -> str:
    """The format of products with a kind of quantization."""
    return next((name for name in PRODUCT_KINDS if kind.startswith(name)), "training_dtype")


def loss_on(denoiser: Denoiser, data: EncodedDataset, device: torch.device) -> float:
    """Mean loss over all pictures, in fp32, at noise of a seed of its own."""
    job = plan_job(denoiser, TrainConfig(batch_size=8, seed=987_654, training_dtype="fp32"), device)
    maker = batch_maker(job.model, data.samples, job.config, job.way)
    with torch.no_grad(), job.model.frozen(job.config, job.way):
        batches = [batch for step in range(8) for batch in maker.step(step)]
        losses = [sample_losses(job.model, batch, job.config, job.way) for batch in batches]
    return torch.cat(losses).mean().item()


def _mean(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f}" + (f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else "")


def _ratio(runs: list[Outcome], reference: list[Outcome], what: str) -> str:
    """Ratios of each run to the plain one with its seed: the mean, and the largest."""
    ratios = [getattr(one, what) / getattr(other, what) for one, other in zip(runs, reference, strict=True)]
    return f"{statistics.mean(ratios):.4f}" + (f" (at most {max(ratios):.4f})" if len(ratios) > 1 else "")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(PACKINGS), choices=list(PACKINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--products", action="store_true", help="multiply in fp8 and int8 where weights are")
    parser.add_argument("--images", default="high-contrast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
