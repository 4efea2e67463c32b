"""Learning rates of the algorithms: short runs on the built-in model, measured by loss and by pictures.

The setting is that of `lorasmith demo`, sixteen pictures of a style that the model has never seen; rates are multiples
of the model's own rate for LoRA. Three numbers show whether a rate is too low, right or too high:

    held-out loss   on the sixteen pictures, at noise that no run has drawn: how much was learnt
    colourless      share of colourless pixels in pictures of eight subjects outside the set: whether the style shows
    concept         share of those pictures in which a classifier finds the subject: whether the model is intact

    python -m benchmarks.learning_rates
    python -m benchmarks.learning_rates --algorithms LoKr OFT --multiples 3 10 30
    python -m benchmarks.learning_rates --multiples default --sheet algorithms.png

`default` is the rate of a run without `--learning-rate`. With `--output` LoRAs are kept, so that a sweep that was
interrupted, or is repeated with more rates, trains no run twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from PIL import Image

from benchmarks.bases import clock_of, machine
from benchmarks.results import Results, add_json
from benchmarks.step_time import VARIANTS
from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.errors import TrainingError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import load_dataset
from lorasmith.families.loading import load_model
from lorasmith.families.model import Denoiser, Model
from lorasmith.report.contact_sheet import contact_sheet
from lorasmith.runs.library import train
from lorasmith.sampling.generate import generate
from lorasmith.training.lora_handle import Lora
from tools.pretrain.data import UNTAUGHT, with_article
from tools.pretrain.judge import Judge, colourless
from tools.pretrain.quality import held_out_noise_loss

PROMPTS = [with_article(subject) for subject in UNTAUGHT]


@dataclass(frozen=True)
class Scores:
    """Measurements of a denoiser, before or after training."""

    loss: float
    colourless: float
    concept: float


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    keep_freed_memory()
    device = torch.device(arguments.device)
    clock = clock_of(device)
    results = Results(arguments, torch=torch.__version__, machine=machine(device))
    model, judge = load_model("lorasmith-tiny", dtype=torch.float32), Judge.load()
    data = load_dataset(BUILT_IN_BASE / "input" / "high-contrast", model, device=device)
    own = model.denoiser.base.defaults.learning_rate
    columns = {"algorithm": "", "× the model's rate": "g", "rate": ".2g"}
    results.table(columns | dict.fromkeys(("held-out loss", "colourless", "concept"), ".3f") | {"training, s": ".1f"})
    scores, pictures = _judged(model.denoiser, data, judge, arguments)
    results.add("base", 0, 0, *astuple(scores), 0)
    rows = {"base": pictures}
    for name in arguments.algorithms:
        for multiple in _multiples(name, arguments.multiples):
            started = clock()
            lora = _trained(name, own * multiple, model, data, arguments)
            taken = clock() - started
            if lora is None:
                results.add(name, multiple, own * multiple, "not finite", None, None, None)
                continue
            scores, pictures = _judged(lora.applied_to(model.denoiser), data, judge, arguments)
            results.add(name, multiple, own * multiple, *astuple(scores), taken)
            rows[f"{name}, {own * multiple:.2g}"] = pictures
    if arguments.sheet is not None:
        contact_sheet(list(rows.values()), list(rows), PROMPTS, min_cell=64).save(arguments.sheet, optimize=True)


def _trained(name: str, rate: float, model: Model, data: EncodedDataset, arguments: argparse.Namespace) -> Lora | None:
    """The LoRA of a run, read if the file exists; None if the loss became infinite."""
    path = arguments.output and arguments.output / f"{name}-{arguments.steps}-steps-{rate:.3g}.safetensors"
    if path is not None and path.exists():
        return Lora.load(path, model)
    try:
        result = train(
            model,
            data,
            steps=arguments.steps,
            batch_size=8,
            rank=arguments.rank,
            seed=arguments.seed,
            device=arguments.device,
            learning_rate=rate,
            validation_share=0.0,
            training_dtype=arguments.dtype,
            lora_dtype="fp32",
            **VARIANTS[name],
        )
    except TrainingError:
        return None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        result.lora.save(path)
    return result.lora


def _judged(
    denoiser: Denoiser, data: EncodedDataset, judge: Judge, arguments: argparse.Namespace
) -> tuple[Scores, Sequence[Image.Image]]:
    pictures = generate(denoiser, PROMPTS, seed=arguments.seed, steps=12, device=torch.device(arguments.device))
    seen = judge.subjects(pictures)
    right = sum(mine == asked for mine, asked in zip(seen, UNTAUGHT, strict=True)) / len(UNTAUGHT)
    return Scores(held_out_noise_loss(denoiser, data.samples)["mean"], colourless(pictures), right), pictures


def _multiples(name: str, asked: Sequence[str]) -> list[float]:
    algorithm = VARIANTS[name].get("algorithm", "LoRA")
    return [ALGORITHMS[algorithm].learning_rate_factor if one == "default" else float(one) for one in asked]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithms", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--multiples", nargs="+", default=["0.3", "1", "3", "10"], metavar="M", help="or `default`")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=8, help="or factor, or block size")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 keeps torch's own choice")
    parser.add_argument("--output", type=Path, help="folder where LoRAs are kept, and taken from if they are there")
    add_json(parser)
    parser.add_argument("--sheet", type=Path, help="PNG of the pictures of all runs, one row for each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
