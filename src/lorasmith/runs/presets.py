"""The three choices for users who set nothing: quick, balanced, thorough.

They are declared here alone, for the page and the documents. Steps follow the number of images: each is seen about as
often, within bounds below which nothing is learnt and above which a LoRA overfits to few pictures. LoRAs are kept on
the way, so that an evaluation can recommend one. Everything else has its default, which model and algorithm decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from lorasmith.core.options import Option, options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.training.config import TrainConfig

USUAL_IMAGES = 20  # images for which the steps of a preset are given where their number is unknown

_ROUND = 50  # steps are multiples of it

_LORAS = 5  # that are kept, the finished one included


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A choice of settings."""

    name: str
    title: Annotated[str, "in words"]
    summary: Annotated[str, "its trade-off, in a sentence"]
    settings: Annotated[Mapping[str, Any], "by name; in responses also those that follow the number of images"]
    steps_per_image: Annotated[int, "how often each image is seen, within the following bounds"]
    least_steps: int
    most_steps: int

    def settings_for(self, images: int | None = None) -> dict[str, Any]:
        """All settings for a number of images; that of `USUAL_IMAGES` if it is unknown."""
        wanted = self.steps_per_image * (USUAL_IMAGES if images is None else images)
        rounded = _ROUND * round(wanted / _ROUND)
        steps = max(self.least_steps, min(self.most_steps, rounded))
        return {"steps": steps, "save_every": steps // _LORAS, **self.settings}


PRESETS: dict[str, Preset] = {
    one.name: one
    for one in (
        Preset(
            name="quick",
            title="Quick",
            summary="A first look in a third of the time: the subject is recognised, details are not there yet.",
            steps_per_image=15,
            least_steps=150,
            most_steps=500,
            settings={"rank": 8, "preview_share": 0.25},
        ),
        Preset(
            name="balanced",
            title="Balanced",
            summary="The usual choice: good likeness in a moderate time, and a LoRA that still follows prompts.",
            steps_per_image=40,
            least_steps=400,
            most_steps=2000,
            settings={"rank": 16},
        ),
        Preset(
            name="thorough",
            title="Thorough",
            summary="The finest details for twice the time and a file twice as large; ends early where held-out images "
            "no longer improve.",
            steps_per_image=80,
            least_steps=800,
            most_steps=5000,
            settings={"rank": 32, "patience": 4},
        ),
    )
}
"""The choices by name, the fastest first."""


def setting_groups() -> dict[str, list[Option]]:
    """Every setting that a page offers, by heading: data first, then training, in the order of declaration."""
    groups: dict[str, list[Option]] = {}
    for config in (DataConfig, TrainConfig):
        for declared in options_of(config).values():
            if declared.door == "any":
                groups.setdefault(declared.group, []).append(declared)
    return groups
