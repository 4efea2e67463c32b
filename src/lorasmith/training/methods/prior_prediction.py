"""Prior prediction: pictures of the class are trained towards what the base model predicts for them.

Unlike with DreamBooth's pictures, which the base model must have drawn, any pictures of the class serve: their contents
are not learnt, and a fresh LoRA has no gradient (OneTrainer's PRIOR_PREDICTION, SimpleTuner's is_regularisation_data).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from lorasmith.diffusion.schedule import per_sample
from lorasmith.training.methods.method import BuiltInMethod, Goal, Passes

if TYPE_CHECKING:
    from lorasmith.training.config import ResolvedConfig


@dataclass(frozen=True)
class PriorPrediction(BuiltInMethod):
    """Prior prediction for the samples of the class."""

    name = "prior_target"

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        return cls() if config.prior_target == "model" else None

    def goal(self, goal: Goal, passes: Passes) -> Goal:
        of_class = passes.batch.of_class
        kept = passes.frozen_for(of_class is not None)
        if of_class is None or kept is None:
            return goal
        return replace(goal, target=torch.where(per_sample(of_class, kept), kept, passes.target(goal)))
