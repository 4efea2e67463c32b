"""Guidance loss: the target of a guidance-distilled model is guided, as its predictions are (ai-toolkit).

    target' = u + g (target − u)     u: the trained prediction for the empty text, without a gradient

At a g of 1 it is the plain loss. g also is the network's input of guidance, so that what it learns is what it draws at
this guidance; with the sigma schedule g falls to 1 towards the clean end: 1 + (g − 1) sigma.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from lorasmith.adapters.adapter import Adapter
from lorasmith.core.errors import OptionError
from lorasmith.core.random import keyed_uniform
from lorasmith.diffusion.schedule import per_sample
from lorasmith.training.methods.guidance_settings import guidance_range
from lorasmith.training.methods.method import BuiltInMethod, Goal, Passes
from lorasmith.training.methods.texts import TextRule

if TYPE_CHECKING:
    from lorasmith.training.config import ResolvedConfig
    from lorasmith.training.trainable import Facts


_TEXT = "unconditional"


@dataclass(frozen=True)
class GuidanceLoss(BuiltInMethod):
    """A guided target, with a g for each draw between two values."""

    least: float
    greatest: float
    by_sigma: bool
    seed: int

    name = "guidance_loss"

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        if config.guidance_loss is None:
            return None
        return cls(*guidance_range(config.guidance_loss), config.guidance_loss_schedule == "sigma", config.seed)

    def check(self, facts: Facts, adapters: Mapping[str, Adapter]) -> None:
        if not facts.takes_guidance:
            raise OptionError(
                f"guidance_loss is for models with distilled guidance, such as Flux.1 dev, got {facts.title}; leave it "
                "out"
            )

    @property
    def texts(self) -> Mapping[str, TextRule]:
        return {_TEXT: lambda caption, trigger: ""}

    def goal(self, goal: Goal, passes: Passes) -> Goal:
        batch = goal.batch
        drawn = [keyed_uniform(self.seed, "guidance", draw) for draw in batch.draws] or [0.0] * len(batch.clean)
        scale = torch.tensor([self.least + (self.greatest - self.least) * share for share in drawn]).to(
            batch.clean.device
        )
        if self.by_sigma:
            scale = 1 + (scale - 1) * batch.level.sigma
        with torch.no_grad():
            away = passes.trained(_TEXT)
        target = away + per_sample(scale, away) * (passes.target(goal) - away)
        context = batch.conditioning.tensors["context"]
        guided = replace(
            batch.conditioning, tensors={**batch.conditioning.tensors, "guidance": scale.to(context.dtype)}
        )
        return Goal(replace(batch, conditioning=guided), target)
