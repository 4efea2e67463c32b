"""Outside of masks, the target is what the base model predicts, so that backgrounds stay as the model draws them.

The weight is that of a place where the mask is 0 (`inverted_mask_prior` of ai-toolkit, OneTrainer's
masked_prior_preservation_weight); between 0 and 1 both targets share the place.
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
class MaskPrior(BuiltInMethod):
    """The base model's prediction as target outside of masks, at a weight."""

    weight: float

    name = "mask_prior_weight"

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        return cls(config.mask_prior_weight) if config.mask_prior_weight else None

    def goal(self, goal: Goal, passes: Passes) -> Goal:
        places = goal.batch.places
        kept = passes.frozen_for(places is not None)
        if places is None or kept is None:
            return goal
        outside = 1 - places / per_sample(places.flatten(1).amax(1).clamp_min(1e-6), places)
        target = torch.lerp(passes.target(goal), kept, outside)
        return Goal(replace(goal.batch, places=places + self.weight * outside), target)
