"""Settings of the methods that keep what the base model draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lorasmith.core.errors import OptionError
from lorasmith.core.options import option
from lorasmith.training.section import Consequences, Section


@dataclass(frozen=True, kw_only=True)
class PreservationSettings(Section, group="Methods", costs=True):
    """Preservation of the class or the blank prompt, of weights, of pictures of the class, and outside of masks."""

    preserve: Literal["none", "class", "blank"] = option(
        "none",
        help="Output preservation, without pictures of the class: hold the prediction for another text to the base "
        "model's. class is the caption with preserve_class in place of the trigger, blank the empty text, which keeps "
        "the unconditional side of guidance. A step takes 2.4 times as long.",
    )
    preserve_class: str | None = option(
        None, is_prompt=True, help="Name of the subject's class for preserve class, such as dog or person."
    )
    preserve_weight: float = option(1.0, min=0.0, max=1000.0, help="Weight of the loss of preserve.")
    weight_change: float = option(
        0.0,
        min=0.0,
        max=1000.0,
        help="Weight in the loss of the squared change of all weights (arXiv:2505.19519), which keeps what the model "
        "knew; of low-rank adapters. 0 disables it.",
    )
    prior_target: Literal["picture", "model"] = option(
        "picture",
        help="Target of pictures of the class (prior preservation): the picture, which the base model should have "
        "drawn, or what the base model predicts for it, for which any pictures of the class serve.",
    )
    mask_prior_weight: float = option(
        0.0,
        min=0.0,
        max=1000.0,
        help="Weight of the loss outside of masks towards what the base model predicts there, which keeps backgrounds "
        "as they are. 0 disables it; 0.5 is usual.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preserve == "class" and not (self.preserve_class or "").strip():
            raise OptionError("preserve class needs the name of the class, got none; set preserve_class, such as dog")

    def own_idle(self) -> Iterator[str]:
        if self.preserve != "class":
            yield from self.has_no_effect("preserve_class", without="preserve class")
        if self.preserve == "none":
            yield from self.has_no_effect("preserve_weight", without="preserve")

    def own_consequences(self) -> Consequences:
        names = ("preserve", "weight_change", "prior_target", "mask_prior_weight")
        return Consequences(takes_further_passes=next((name for name in names if not self.is_default(name)), ""))
