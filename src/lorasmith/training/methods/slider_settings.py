"""Settings of sliders between prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorasmith.core.errors import OptionError
from lorasmith.core.options import option, options_of
from lorasmith.training.section import Consequences, Section

SLIDER_STRENGTHS = (-2.0, -1.0, 1.0, 2.0)
"""Strengths at which a finished slider is drawn."""


@dataclass(frozen=True, kw_only=True)
class SliderSettings(Section, group="Methods", costs=True):
    """The prompts of a slider."""

    slider_positive: str | None = option(
        None,
        is_prompt=True,
        help="Prompt of a slider's positive end: train a LoRA whose strength is the amount of an attribute, from "
        "prompts. The pictures are not learnt, but what the prompts make of them.",
    )
    slider_negative: str = option("", is_prompt=True, help="Prompt of a slider's negative end.")
    slider_neutral: str | None = option(
        None, is_prompt=True, help="Prompt between a slider's ends. Default: the caption of each picture."
    )
    slider_anchors: str | None = option(
        None, is_prompt=True, help="Prompts that a slider must not change, separated by |."
    )
    slider_guidance: float = option(3.0, min=0.1, max=100.0, help="Distance of a slider's ends at strengths of ±1.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slider_positive is not None and self.slider_positive == self.slider_negative:
            raise OptionError(
                f"the ends of a slider must be two prompts, got {self.slider_positive!r} for both; change "
                "slider_negative"
            )

    def own_idle(self) -> Iterator[str]:
        if self.slider_positive is None:
            yield from self.has_no_effect(*options_of(SliderSettings), without="slider_positive")

    def own_consequences(self) -> Consequences:
        if self.slider_positive is None:
            return Consequences()
        return Consequences(
            strengths=SLIDER_STRENGTHS,
            prompt=self.slider_neutral or "",
            learns_no_subject=True,
            takes_further_passes="slider_positive",
        )
