"""A step of more than one pass: what a `Method` adds to it, and the passes that it may ask for.

A plain step is one prediction of the trained model for each batch, and one backward pass. Methods change the goal of
that prediction, or add terms, each of which is a loss with a backward pass of its own. For both they may ask for more
predictions on the same noise and level: of the frozen model, whose adapters are turned off, or of the trained one, with
the conditioning of another text (`Method.texts`), which is cached like the caption's, or for the other pictures of its
pairs (`Passes.opposite`).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.inject import Dial
from lorasmith.diffusion.losses import diffusion_loss, loss_weights
from lorasmith.diffusion.schedule import PARAMETERIZATIONS
from lorasmith.families.conditionings import Conditioning
from lorasmith.training.methods.texts import TextRule

if TYPE_CHECKING:
    from lorasmith.training.batches import Batch
    from lorasmith.training.config import ResolvedConfig
    from lorasmith.training.trainable import Facts


class Method:
    """What a method adds to a step; see the module.

    One is made several times in a run and keeps nothing between two steps, so that a run continues to the bit: its
    values are functions of its arguments, the batch (whose `draws` and `settings.seed` are keys of random numbers,
    `core.random`) and the weights. A method of an extension is an instance of a subclass; its arguments, such as the
    fields of a dataclass, are those of the setting `method_args`.

    Attributes:
        name: of the setting that turns it on, for messages.
        replaces_goal: whether its terms take the place of the loss of the pictures.
        needs_opposites: whether samples must be pairs.
    """

    name: str = "method"
    replaces_goal: bool = False
    needs_opposites: bool = False

    def check(self, facts: Facts, adapters: Mapping[str, Adapter]) -> None:
        """Called before the run.

        Args:
            facts: of the model.
            adapters: those in training, by module path.

        Raises:
            OptionError: the method is not for this model or these adapters.
        """
        return

    @property
    def texts(self) -> Mapping[str, TextRule]:
        """Further texts of each sample, functions of its caption and the trigger, by names of the method's own."""
        return {}

    def goal(self, goal: Goal, passes: Passes) -> Goal:
        """The goal of the trained prediction in place of `goal`."""
        return goal

    def terms(self, passes: Passes) -> Iterator[Tensor]:
        """Further losses, (batch,) fp32 each, differentiable; the backward pass of one ends before the next is asked
        for. Where weights are sharded (`passes.are_equal`), all batches of a step need equally many predictions.
        """
        yield from ()

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """A term of the whole step that depends on the weights alone, a scalar; None for none."""
        return None


class BuiltInMethod(Method, ABC):
    """A method with settings of its own."""

    @classmethod
    @abstractmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        """The method as these settings have it; None if they leave it out."""


@dataclass(frozen=True)
class Goal:
    """What the trained prediction of a batch is compared with."""

    batch: Batch  # whose conditioning the prediction has, and whose places weigh the loss
    target: Tensor | None = None  # fp32 of the latents' shape; None for the batch's own


@dataclass(frozen=True)
class Passes:
    """The predictions that a method may ask for, fp32 of the latents' shape, for the samples of a batch.

    `text` is the name of one of the method's texts; None for the caption.
    """

    batch: Batch
    parameterization: str
    predict: Callable[[Batch, Conditioning], Tensor]  # with the adapters as the dial has them
    dial: Dial
    # whether each batch of a step must have as many passes as those of other processes
    are_equal: bool = False

    @property
    def opposite(self) -> Passes:
        """The same for the other pictures of the pairs."""
        assert self.batch.opposite is not None  # see `check_opposites`
        return replace(self, batch=self.batch.opposite)

    def trained(self, text: str | None = None) -> Tensor:
        """Of the trained model, differentiable unless gradients are off."""
        return self.predict(self.batch, self.batch.conditioning if text is None else self.batch.texts[text]).float()

    def frozen(self, text: str | None = None) -> Tensor:
        """Of the frozen model, without a gradient."""
        with torch.no_grad(), self.dial.turned(0.0):
            return self.trained(text)

    def frozen_for(self, is_needed: bool) -> Tensor | None:
        """The frozen prediction for the caption if it is needed; where passes must be equal, it is computed anyway."""
        found = self.frozen() if is_needed or self.are_equal else None
        return found if is_needed else None

    def target(self, goal: Goal) -> Tensor:
        """The target of a goal, fp32."""
        if goal.target is not None:
            return goal.target
        return PARAMETERIZATIONS[self.parameterization].target(self.batch.clean, self.batch.noise, self.batch.level)

    def losses(self, prediction: Tensor) -> Tensor:
        """Loss of each sample, (batch,) fp32, as a plain step has it."""
        assert self.batch.settings is not None
        return prediction_losses(prediction, self.batch, self.batch.settings, self.parameterization)

    def scaled(self, strength: float) -> contextlib.AbstractContextManager[None]:
        """Context in which the trained model's adapters have a strength; a term is yielded inside of it."""
        return self.dial.turned(strength)


def prediction_losses(
    prediction: Tensor, batch: Batch, config: ResolvedConfig, parameterization: str, target: Tensor | None = None
) -> Tensor:
    """Loss of each sample, (batch,) fp32, from a prediction of the latents' shape; `target` replaces the batch's."""
    losses = diffusion_loss(
        prediction,
        batch,
        parameterization=parameterization,
        objective=config.objective,
        loss_function=config.loss_function,
        target=target,
    )
    return losses * loss_weights(
        batch.level,
        weighting=config.loss_weighting,
        gamma=config.min_snr_gamma,
        parameterization=parameterization,
        objective=config.objective,
    )
