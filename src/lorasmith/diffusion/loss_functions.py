"""What a loss is, and those that can be named; torch is imported where they are called, as settings read the names."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol

from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import Code, code_of
from lorasmith.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from lorasmith.diffusion.schedule import NoiseLevel


class LossBatch(Protocol):
    """The samples of a forward pass, as a loss may read them; all tensors are on the device of the prediction.

    Attributes:
        clean: latents, fp32 (batch, channels, [frames,] height, width), as `noise` and `noised`.
        noise: what was added to them.
        noised: what the model saw, before it was cast to the dtype of products.
        level: noise levels: `alpha`, `sigma` and `time`, (batch,) each.
        share: of diffusion time, 0 for clean to 1 for noise, (batch,); None outside of a run.
        conditioning: the captions, encoded: `conditioning.tensors` by name.
        names: of the samples; empty for a pass that only keeps processes in step, whose loss does not count.
        places: weights of the loss by pixel (masks), fp32, broadcasting to `clean`; None for 1.
        settings: of the run, a `TrainConfig`; None outside of one.
    """

    @property
    def clean(self) -> Tensor: ...
    @property
    def noise(self) -> Tensor: ...
    @property
    def noised(self) -> Tensor: ...
    @property
    def level(self) -> NoiseLevel: ...
    @property
    def share(self) -> Tensor | None: ...
    @property
    def conditioning(self) -> Any: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def places(self) -> Tensor | None: ...
    @property
    def settings(self) -> Any: ...
    def frozen(self) -> Tensor:
        """The frozen model's prediction for the same samples, as `prediction` without a gradient; computed once.

        Where weights are sharded, the losses of all batches must ask for it, or none.

        Raises:
            OptionError: outside of a step, or in runs that train together.
        """
        ...


class Loss(Protocol):
    """Compares a prediction with its target."""

    def __call__(self, prediction: Tensor, target: Tensor, batch: LossBatch, /) -> Tensor:
        """The loss of each sample.

        Args:
            prediction: what `objective` compares, fp32 of the latents' shape, differentiable.
            target: its target, of the same shape.
            batch: the samples.

        Returns:
            (batch,) of a float dtype. The weights of noise levels and samples multiply it afterwards.
        """
        ...


LOSSES: Registry[Loss] = Registry("loss function", group="losses")


def may_ask_frozen(name: str) -> bool:
    """Whether a loss may ask for the frozen model's prediction: those of extensions and programs."""
    return name not in LOSSES or LOSSES.extension(name) is not None


def _mean(distance: Tensor, batch: LossBatch) -> Tensor:
    """The mean over a sample, weighted by its places."""
    return (distance if batch.places is None else distance * batch.places).flatten(1).mean(1)


def _mean_of(elementwise: str) -> Loss:
    """The mean of a function of `torch.nn.functional`."""

    def loss(prediction: Tensor, target: Tensor, batch: LossBatch) -> Tensor:
        from torch.nn import functional

        return _mean(getattr(functional, elementwise)(prediction, target, reduction="none"), batch)

    return loss


for _name, _elementwise in {
    "MSE": "mse_loss",
    "L1": "l1_loss",
    "Huber": "huber_loss",
    "SmoothL1": "smooth_l1_loss",
}.items():
    LOSSES.register(_name)(_mean_of(_elementwise))


@LOSSES.register("PseudoHuber")
def _pseudo_huber(prediction: Tensor, target: Tensor, batch: LossBatch) -> Tensor:
    """2c (√(d² + c²) − c): quadratic below c and linear above; sd-scripts' `huber`, with its schedules of c."""
    from lorasmith.diffusion.schedule import per_sample

    bound, schedule = batch.settings.huber_c, batch.settings.huber_schedule
    if schedule == "snr":
        ratio = batch.level.sigma / batch.level.alpha
        bound = per_sample((1 - bound) / (1 + ratio) ** 2 + bound, prediction)
    else:
        if schedule == "exponential":
            assert batch.share is not None
            bound = per_sample(bound**batch.share, prediction)
        bound = bound * batch.settings.huber_scale
    return _mean(2 * bound * (((prediction - target).square() + bound**2).sqrt() - bound), batch)


def check_loss(name: Code) -> None:
    """Raise OptionError unless a setting names a loss."""
    found = code_of(name, LOSSES)
    if isinstance(found, type):
        raise OptionError(
            f"loss must be a function of prediction, target and batch, but {name} is a class; pass an instance, or a "
            "function that calls one"
        )
    try:
        inspect.signature(getattr(found, "forward", found)).bind("prediction", "target", "batch")
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"loss must be a function of prediction, target and batch, which {name} is not: {error}; correct it"
        ) from error
