"""Held-out loss against training time, of recipes on the built-in model: which defaults learn fastest.

Sixteen pictures of a style that the model has not seen; four are held out and measured at fixed noise. Every recipe
runs in this project's engine, so that a step costs the same and only the learning per step differs. Time is that of
the steps alone, on the CPU processor time.

    python -m benchmarks.learning --recipes comfyui ours --seeds 0 1 2 --steps 500 --plot curves.png
    python -m benchmarks.learning --recipes ours ours,schedule=cosine ours,ema_decay=0.99
    python -m benchmarks.learning --recipes bf16 int8 int8-convrot mxfp8 nvfp4 --emulate --seeds 0 1 2 3 4 --steps 60

Curves are means over the seeds with their intervals of 95 % (Student's t), of losses and of their ratios to the first
recipe's with the same seed. Losses of a run with quantized weights are measured with them.

A recipe is a name of `RECIPES`, and changes to it. `comfyui` has the defaults of ComfyUI's Train LoRA: every layer,
uniform times, loss on the clean picture, AdamW on bf16 weights, alpha 1 (a scale of 1 / rank), and no clipping.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.bases import clock_of, machine
from benchmarks.results import Results, add_json
from lorasmith.core import quantized_products
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.dataset import EncodedDataset
from lorasmith.data.encoding import load_dataset
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.training.events import Event, StepDone, Validated

Curve = list[tuple[float, float]]
"""Seconds of training and held-out loss."""

COMFYUI = {
    "learning_rate": 5e-4,
    "alpha": 1.0,
    "zero_init": "down",
    "targets": "all",
    "objective": "x0",
    "timesteps": "uniform",
    "stratified": False,
    "max_grad_norm": 0.0,
    "optimizer": "benchmarks.learning.Bf16AdamW",
}
_BF16 = {"training_dtype": "bf16", "exact_dtype": True, "targets": "all-linear"}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "comfyui": COMFYUI,
    "bf16": _BF16,
    **{kind: {**_BF16, "quantization": kind, "products": kind} for kind in ("int8", "mxfp8", "nvfp4")},
    "int8-convrot": {**_BF16, "quantization": "int8_convrot", "products": "int8"},
}

_T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of 97.5 % of Student's distribution, by degrees of freedom."""


class Bf16AdamW(torch.optim.AdamW):
    """AdamW on weights and moments in bf16, without a master copy."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step in fp32 and round all of it."""
        super().step()
        for group in self.param_groups:
            for weight in group["params"]:
                for tensor in (weight, *(one for name, one in self.state[weight].items() if name != "step")):
                    assert isinstance(tensor, Tensor)
                    tensor.copy_(tensor.bfloat16())


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    results = Results(arguments, torch=torch.__version__, machine=machine(device))
    model = load_model("lorasmith-tiny")
    data = load_dataset(BUILT_IN_BASE / "input" / arguments.images, model, device=device)
    curves: dict[str, list[Curve]] = {recipe: [] for recipe in arguments.recipes}
    has_all = mock.patch.object(quantized_products, "has_products", return_value=True)
    with has_all if arguments.emulate else nullcontext():
        for seed, recipe in itertools.product(arguments.seeds, arguments.recipes):
            curves[recipe].append(_curve(model, data, recipe, seed, arguments))
    _report(curves, arguments, results)
    if arguments.plot:
        _plot(curves, arguments.plot)


def settings_of(recipe: str) -> dict[str, Any]:
    """`ours,schedule=cosine,warmup_steps=20` in settings."""
    name, *changes = recipe.split(",")
    settings = dict(RECIPES[name])
    for change in changes:
        key, _, text = change.partition("=")
        try:
            settings[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[key] = text
    return settings


def _curve(model: Model, data: EncodedDataset, recipe: str, seed: int, arguments: argparse.Namespace) -> Curve:
    """Held-out loss by seconds, from the base model on."""
    seconds = 0.0
    clock = clock_of(torch.device(arguments.device))
    since = clock()
    curve: Curve = []

    def on_event(event: Event) -> None:
        nonlocal seconds, since
        if isinstance(event, StepDone):
            now = clock()
            seconds, since = seconds + now - since, now
        elif isinstance(event, Validated):
            if not curve:
                curve.append((0.0, event.base_loss))
            curve.append((seconds, event.loss))
            since = clock()

    fixed: dict[str, Any] = {
        "steps": arguments.steps,
        "rank": arguments.rank,
        "batch_size": arguments.batch,
        "validation_share": 0.25,
        "validate_every": arguments.every,
        "validation_draws": 16,
    }
    train(model, data, seed=seed, device=arguments.device, on_event=on_event, **(fixed | settings_of(recipe)))
    print(
        f"  {recipe} seed {seed}: " + " ".join(f"{loss:.4f}" for _, loss in curve[:: max(1, len(curve) // 10)]),
        flush=True,
    )
    return curve


def _reaches(curve: Curve, loss: float) -> float:
    """Seconds after which a curve is below a loss, by linear interpolation; infinite if it never is."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low) if high > loss else before
    return float("inf")


def _report(curves: Mapping[str, list[Curve]], arguments: argparse.Namespace, results: Results) -> None:
    first = arguments.recipes[0]
    columns = {"recipe": "", "held-out loss at the end": ".4f", "its deviation": ".4f", "best": ".4f", "seconds": ".1f"}
    results.table({**columns, f"time to the end loss of {first}, share of its time": ""})
    for recipe, runs in curves.items():
        ends = [run[-1][1] for run in runs]
        bests = [min(loss for _, loss in run) for run in runs]
        shares = [_reaches(run, other[-1][1]) / other[-1][0] for run, other in zip(runs, curves[first], strict=True)]
        results.add(
            recipe,
            statistics.mean(ends),
            statistics.stdev(ends) if len(ends) > 1 else None,
            statistics.mean(bests),
            statistics.mean(run[-1][0] for run in runs),
            ", ".join(f"{share:.3f}" for share in shares),
        )
    count = len(curves[first][0])
    steps = {f"step {min(index * arguments.every, arguments.steps)}": "" for index in range(count)}
    for title, reference in (("Held-out loss", None), (f"Held-out loss, share of that of {first}", curves[first])):
        results.table({"recipe": "", **steps}, title=title)
        for recipe, runs in curves.items():
            whole = [[loss for _, loss in run] for run in runs]
            if reference is not None:
                whole = [
                    [x / y for x, (_, y) in zip(*both, strict=True)] for both in zip(whole, reference, strict=True)
                ]
            results.add(recipe, *(_interval(at_step) for at_step in zip(*whole, strict=True)))


def _interval(values: Sequence[float]) -> str:
    """The mean, and half of its interval of 95 %."""
    mean, count = statistics.mean(values), len(values)
    if count == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {_T_95[count - 1] * statistics.stdev(values) / math.sqrt(count):.4f}"


def _plot(curves: Mapping[str, list[Curve]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (recipe, runs), colour in zip(
        curves.items(), ("#1f5fa8", "#c0562b", "#3a8a4d", "#7a4fa3", "#777777") * 9, strict=False
    ):
        for number, run in enumerate(runs):
            axes.plot(*zip(*run, strict=True), color=colour, label=recipe if number == 0 else None)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("loss on four held-out pictures")
    axes.grid(color="#e4e8ec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["comfyui", "ours"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=20, help="steps between looks at the held-out pictures")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--images", default="high-contrast")
    parser.add_argument("--emulate", action="store_true", help="compute products that the device lacks by emulation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    add_json(parser)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
