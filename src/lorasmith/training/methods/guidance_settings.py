"""Settings of the guidance loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lorasmith.core.errors import OptionError
from lorasmith.core.options import option
from lorasmith.training.section import Consequences, Section


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings(Section, group="Methods", costs=True):
    """The guidance by which targets are guided."""

    guidance_loss: str | None = option(
        None,
        help="Guidance loss, for models with distilled guidance: the guidance by which targets are guided, which is "
        "also the model's input, as a number or a range to draw from, such as 3 or 2-4. Default: none.",
    )
    guidance_loss_schedule: Literal["constant", "sigma"] = option(
        "constant", help="Guidance of guidance_loss over noise levels: sigma has it fall to 1 towards the clean end."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_loss is not None:
            guidance_range(self.guidance_loss)

    def own_idle(self) -> Iterator[str]:
        if self.guidance_loss is None:
            yield from self.has_no_effect("guidance_loss_schedule", without="guidance_loss")

    def own_consequences(self) -> Consequences:
        name = "" if self.guidance_loss is None else "guidance_loss"
        return Consequences(takes_further_passes=name, runs_on_host=name)


def guidance_range(text: str) -> tuple[float, float]:
    """Least and greatest guidance of `guidance_loss`. Raises OptionError."""
    try:
        least, *most = map(float, text.split("-"))
        greatest = most.pop() if most else least
    except ValueError:
        least, greatest, most = 0.0, 0.0, []
    if most or not 1 <= least <= greatest <= 100:
        raise OptionError(f"guidance_loss must be a number from 1 to 100, or a range such as 2-4, got {text!r}")
    return least, greatest
