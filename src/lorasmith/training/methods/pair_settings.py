"""Settings of training on pairs of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lorasmith.core.options import option
from lorasmith.training.methods.slider_settings import SLIDER_STRENGTHS
from lorasmith.training.section import Consequences, Section


@dataclass(frozen=True, kw_only=True)
class PairSettings(Section, group="Methods", costs=True):
    """What is learnt from pairs, and how strictly."""

    pairs: Literal["none", "slider", "dpo"] = option(
        "none",
        help="Train on pairs of pictures: each image is the positive example, and its control of the same name the "
        "negative one. slider makes the LoRA's strength the amount of what differs, images at 1 and controls at -1; a "
        "step takes twice as long. dpo has the model prefer images to their controls (Diffusion-DPO, Flow-DPO), three "
        "times as long.",
    )
    pair_focus: float = option(
        1.0,
        min=0.0,
        max=1.0,
        help="Share of the weight of the loss of pairs slider that follows how much the pictures of a pair differ at a "
        "place; with 0 all places weigh alike.",
    )
    dpo_beta: float = option(
        5000.0,
        min=0.1,
        max=1e6,
        help="Strength with which pairs dpo holds the model to the base model; the paper has 2000 for Stable Diffusion "
        "1 and 5000 for SDXL.",
    )

    def own_idle(self) -> Iterator[str]:
        if self.pairs != "slider":
            yield from self.has_no_effect("pair_focus", without="pairs slider")
        if self.pairs != "dpo":
            yield from self.has_no_effect("dpo_beta", without="pairs dpo")

    def own_consequences(self) -> Consequences:
        if self.pairs == "none":
            return Consequences()
        return Consequences(
            strengths=SLIDER_STRENGTHS if self.pairs == "slider" else (),
            are_pairs=True,
            learns_no_subject=True,
            takes_further_passes="pairs",
        )
