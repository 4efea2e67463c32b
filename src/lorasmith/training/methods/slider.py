"""Concept sliders (Gandikota et al. 2023, arXiv:2311.12092): a LoRA whose strength is the amount of an attribute.

From prompts (`Slider`):

    at strength ±1:   prediction(neutral)  →  n ± g (p − q)

n, p and q are the frozen model's predictions for the neutral, the positive and the negative prompt, all on the same
noised picture. The picture itself is not learnt. Anchors are prompts that neither side may change.

From pairs of pictures (`PairSlider`), with the caption, noise and level of the pair:

    at strength +1:   prediction(noised picture)   →  its own target, as in a plain step
    at strength −1:   prediction(noised opposite)  →  its own

What both pictures share pulls the weights in opposite directions, and what differs in one.
Only a change of the weights that is linear in the strength has the attribute's opposite at a negative one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from torch import Tensor

from lorasmith.adapters.adapter import Adapter
from lorasmith.core.errors import OptionError
from lorasmith.diffusion.schedule import per_sample
from lorasmith.training.methods.method import BuiltInMethod, Passes
from lorasmith.training.methods.texts import TextRule

if TYPE_CHECKING:
    from lorasmith.training.config import ResolvedConfig
    from lorasmith.training.trainable import Facts

_POSITIVE, _NEGATIVE, _NEUTRAL, _ANCHOR = "positive", "negative", "neutral", "anchor"


@dataclass(frozen=True)
class Slider(BuiltInMethod):
    """A slider between two prompts; `neutral` None is each picture's caption."""

    positive: str
    negative: str
    neutral: str | None
    anchors: tuple[str, ...]
    guidance: float

    name = "slider_positive"
    replaces_goal = True

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        if config.slider_positive is None:
            return None
        anchors = tuple(filter(None, (part.strip() for part in (config.slider_anchors or "").split("|"))))
        return cls(
            config.slider_positive, config.slider_negative, config.slider_neutral, anchors, config.slider_guidance
        )

    def check(self, facts: Facts, adapters: Mapping[str, Adapter]) -> None:
        _check_additive(adapters)

    @property
    def texts(self) -> Mapping[str, TextRule]:
        fixed = {_POSITIVE: self.positive, _NEGATIVE: self.negative}
        fixed |= {} if self.neutral is None else {_NEUTRAL: self.neutral}
        fixed |= {f"{_ANCHOR} {number}": text for number, text in enumerate(self.anchors)}
        return {name: lambda caption, trigger, text=text: text for name, text in fixed.items()}  # type: ignore[misc]

    def terms(self, passes: Passes) -> Iterator[Tensor]:
        neutral = None if self.neutral is None else _NEUTRAL
        change = self.guidance * (passes.frozen(_POSITIVE) - passes.frozen(_NEGATIVE))
        kept = {text: passes.frozen(text) for text in (neutral, *(name for name in self.texts if _ANCHOR in name))}
        for strength in (1.0, -1.0):
            with passes.scaled(strength):
                for text, prediction in kept.items():
                    target = prediction + strength * change if text == neutral else prediction
                    yield (passes.trained(text) - target).square().flatten(1).mean(1) / 2


@dataclass(frozen=True)
class PairSlider(BuiltInMethod):
    """A slider between the pictures of pairs; `focus` is the share of the loss that follows where they differ."""

    focus: float

    name = "pairs"
    replaces_goal = True
    needs_opposites = True

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        return cls(config.pair_focus) if config.pairs == "slider" else None

    def check(self, facts: Facts, adapters: Mapping[str, Adapter]) -> None:
        _check_additive(adapters)

    def terms(self, passes: Passes) -> Iterator[Tensor]:
        weights = difference_weights(passes.batch.clean, passes.opposite.batch.clean, self.focus)
        for strength, side in ((1.0, passes), (-1.0, passes.opposite)):
            places = weights if side.batch.places is None else weights * side.batch.places
            focused = replace(side, batch=replace(side.batch, places=places)) if self.focus else side
            with focused.scaled(strength):
                yield focused.losses(focused.trained()) / 2


def difference_weights(one: Tensor, other: Tensor, focus: float) -> Tensor:
    """Weights of the loss by place, 1 − f + f · min(|Δ| / its mean, 8), (batch, 1, [frames,] height, width).

    Args:
        one, other: latents (batch, channels, [frames,] height, width); |Δ| is the mean over channels.
        focus: f, from 0 for equal weights to 1.
    """
    change = (one - other).abs().mean(1, keepdim=True)
    mean = per_sample(change.flatten(1).mean(1).clamp_min(1e-6), change)
    return 1 - focus + focus * (change / mean).clamp(max=_MOST_WEIGHT)


_MOST_WEIGHT = 8.0


def _check_additive(adapters: Mapping[str, Adapter]) -> None:
    if other := next((adapter.algorithm for adapter in adapters.values() if not adapter.is_additive), None):
        raise OptionError(
            "a slider needs a kind of adapter that adds to the weights, so that negative strengths are the "
            f"opposite, got {other}; choose LoRA, LoHa or LoKr without DoRA"
        )
