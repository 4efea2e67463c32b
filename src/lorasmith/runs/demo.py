"""The demo: train a drawing style on the built-in model from sixteen pictures, and draw before and after."""

from __future__ import annotations

from pathlib import Path

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.data_config import ImageSource
from lorasmith.families.locating import BUILT_IN, named_path
from lorasmith.runs.run import RUNS
from lorasmith.runs.spec import RunSpec
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


def demo_spec(*, steps: int, seed: int, output: Path | None, device: str | None) -> RunSpec:
    """The demo's run, in a new folder under `runs/` without an output. Raises ModelError without `lorasmith-tiny`.

    Its previews are of the base model and of the finished LoRA alone.
    """
    named_path(BUILT_IN)
    settings = {
        "steps": steps,
        "batch_size": 8,
        "rank": 8,
        "seed": seed,
        "validation_share": 0.0,
        "previews": " | ".join(_PROMPTS),
        "preview_every": steps,
    }
    sources = (ImageSource(str(_EXAMPLES)),)
    output = output or new_run_folder(RUNS, "demo")
    return RunSpec(sources=sources, model=BUILT_IN, output=str(output), device=device, settings=settings)
