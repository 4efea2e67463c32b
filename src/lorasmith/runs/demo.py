"""The demo: train a drawing style on the built-in model from sixteen pictures, and draw before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorasmith.core.files import atomic_path
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.data_config import ImageSource
from lorasmith.families.locating import BUILT_IN, named_path
from lorasmith.families.model import Model
from lorasmith.report.contact_sheet import contact_sheet
from lorasmith.runs.run import RUNS
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling.generate import generate
from lorasmith.training.results import TrainResult
from lorasmith.training.storage.run_folder import new_run_folder

_EXAMPLES = BUILT_IN_BASE / "input" / "high-contrast"
_PROMPTS = (
    "a lion",
    "a penguin",
    "a skull",
    "a red heart",
    "a robot",
    "a panda",
    "a cactus",
    "a light bulb",
)  # subjects that the training pictures do not show
_STRENGTHS = (0.0, 0.5, 1.0)


def demo_spec(*, steps: int, seed: int, output: Path | None, device: str | None) -> RunSpec:
    """The demo's run, in a new folder under `runs/` without an output. Raises ModelError without `lorasmith-tiny`."""
    named_path(BUILT_IN)
    settings = {"steps": steps, "batch_size": 8, "rank": 8, "seed": seed, "validation_share": 0.0, "previews": ""}
    sources = (ImageSource(str(_EXAMPLES)),)
    output = output or new_run_folder(RUNS, "demo")
    return RunSpec(sources=sources, model=BUILT_IN, output=str(output), device=device, settings=settings)


def before_and_after(
    model: Model, result: TrainResult, *, seed: int, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Draw subjects that were not trained at several strengths; returns the sheet, a PNG in the run's folder.

    `progress` receives (sampling steps done, total).
    """
    assert result.folder is not None
    rows = []
    for index, strength in enumerate(_STRENGTHS):

        def show(done: int, total: int, before: int = index) -> None:
            if progress is not None:
                progress(before * total + done, total * len(_STRENGTHS))

        adapted = result.lora.applied_to(model.denoiser, strength=strength)
        rows.append(generate(adapted, _PROMPTS, seed=seed, progress=show))
    labels = ["base" if strength == 0 else f"LoRA {strength:g}" for strength in _STRENGTHS]
    sheet = result.folder / "before-and-after.png"
    with atomic_path(sheet) as temporary:
        contact_sheet(rows, labels, _PROMPTS).save(temporary, format="png")
    return sheet
