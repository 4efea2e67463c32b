"""What is stored of an evaluation: measures of each LoRA, and the recommendation; and of a gallery.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lorasmith.core.files import read_regular
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.options import check_options, option
from lorasmith.core.typed_json import typed

NOISES = 3  # from which the trigger and each prompt are drawn if no other number is asked for; one says too little
EVALUATION = "evaluation"  # folder of it in that of a run
EVALUATION_RECORD, EVALUATION_PAGE = "evaluation.json", "evaluation.html"

Outcome = Literal["use", "no pictures", "not comparable", "changes nothing", "nothing learnt", "ignores prompts"]


@dataclass(frozen=True, kw_only=True)
class DrawingSettings:
    """How LoRAs are drawn to be evaluated."""

    prompts: tuple[str, ...] = ()  # wishes; those with the trigger are whole prompts. Empty for the default ones
    class_word: str | None = None  # None for the trigger without its first word
    most: int = option(10, min=1, help="LoRAs to draw; of more, evenly spaced ones.")
    seed: int = option(0, min=0, help="Seed of the initial noise.")
    noises: int = option(
        NOISES, min=1, max=16, help="Noises from which the trigger and each prompt are drawn: more are surer."
    )
    steps: int | None = option(None, min=1, help="Sampling steps. Default: 20, and fewer of a distilled model.")
    width: int | None = None  # in pixels, as is `height`; None for the model's own
    height: int | None = None

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What the pictures of a LoRA show. Null is what could not be measured."""

    likeness: Annotated[float | None, "mean cosine of the pictures with the trigger and the training pictures"]
    adherence: Annotated[float | None, "how surely wishes are recognised: 1 as with the base model, 0 by chance"]
    diversity: Annotated[float | None, "mean distance of two pictures of the trigger"]
    memorisation: Annotated[
        float | None, "how much nearer a training picture is than the nearest other one of a training picture"
    ]
    drift: Annotated[float | None, "mean distance of pictures without the trigger from the base model's"]
    bleed: Annotated[float | None, "distance of the picture of the class from the base model's"]
    change: Annotated[float, "mean distance of pictures of the trigger from the base model's"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is known of the training pictures."""

    count: int
    self_likeness: Annotated[float | None, "mean cosine of two of them; null for fewer than two"]
    base_likeness: Annotated[float | None, "of what the base model draws for the same prompts"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which LoRA to use."""

    outcome: Outcome
    best: Annotated[int | None, "place of the recommended one, from 0; null if none is"] = None
    ignored_from: Annotated[int | None, "place of the first one after it, from which on prompts are ignored"] = None
    copied: Annotated[bool, "whether the recommended one draws copies of training pictures"] = False


@dataclass(frozen=True, kw_only=True)
class EvaluatedLora:
    """A LoRA, what was measured, and its picture of each prompt."""

    file: Annotated[str, "name of the file"]
    label: str
    step: Annotated[int | None, "updates; null if the file does not say"]
    measures: Measures
    pictures: Annotated[tuple[str, ...], "names of files in the folder"]

    @property
    def line(self) -> str:
        """Its measures, for a terminal."""
        shown = {"likeness": self.measures.likeness, "adherence": self.measures.adherence}
        found = [f"{name} {value:.2f}" for name, value in shown.items() if value is not None]
        return f"{self.label}: {', '.join(found) or 'not measured'}"


@dataclass(frozen=True, kw_only=True)
class StrengthRow:
    """Pictures of the recommended LoRA at a strength, of the first prompts."""

    strength: float
    pictures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation, as it is stored and as `lorasmith.evaluate` returns it; pictures are files in its folder."""

    title: Annotated[str, "of the run or file"]
    model: Annotated[str, "title of the base model"]
    trigger: Annotated[str, "phrase for the subject"]
    seed: Annotated[int, "of the initial noise"]
    sampling_steps: Annotated[int, "of each picture"]
    prompts: Annotated[tuple[str, ...], "of the pictures, the trigger alone first"]
    base: Annotated[tuple[str, ...], "pictures of the base model"]
    loras: Annotated[tuple[EvaluatedLora, ...], "in the order of their training"]
    training: Training
    verdict: Verdict
    sentence: Annotated[str, "the recommendation and its reason, or why there is none"]
    strengths: Annotated[tuple[StrengthRow, ...], "pictures of the recommended LoRA at several strengths"] = ()
    notes: Annotated[tuple[str, ...], "remarks, one sentence each"] = ()


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """A picture with a LoRA at a strength."""

    step: int
    strength: float
    file: Annotated[str, "its path among the files of the run"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Pictures of a prompt in a gallery, by step and strength."""

    wish: Annotated[str, "what was asked for beside the trigger"]
    prompt: str
    seed: int
    base: Annotated[str, "picture of the base model"]
    cells: tuple[GridCell, ...]


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation in a folder; None if there is none, or its record is damaged or of another version."""
    try:
        found = typed(parse_foreign_json(read_regular(folder / EVALUATION_RECORD)), Evaluation)
    except (OSError, ValueError):
        return None
    rows = [found.base, *(lora.pictures for lora in found.loras)]
    best = 0 if found.verdict.best is None else found.verdict.best
    fits = all(len(row) == len(found.prompts) for row in rows) and 0 <= best < len(found.loras)
    return found if fits else None
