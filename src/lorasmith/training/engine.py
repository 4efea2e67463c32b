"""The training loop: adapters on a denoiser, fitted to samples.

The engine knows a denoiser as a module and a predict function, so it trains models that another program loaded as well
as ours. Nothing in a step waits for the device: losses come to the host late, and a non-finite one has by then been
kept out of the weights by a flag on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorasmith.adapters.base import Adapter
from lorasmith.adapters.difference import Difference
from lorasmith.adapters.dropout import Dropout
from lorasmith.adapters.inject import Attached, attached
from lorasmith.adapters.patch import attachments, merged_weights
from lorasmith.core.errors import TrainingError
from lorasmith.core.placement import held, memory_format_for
from lorasmith.data.dataset import Sample
from lorasmith.diffusion.losses import diffusion_loss
from lorasmith.diffusion.timesteps import quantile_map
from lorasmith.families.model import Denoiser
from lorasmith.training.batches import Batch, BatchMaker, no_masks, prefetched
from lorasmith.training.checkpointing import checkpointed
from lorasmith.training.events import EventHandler, StepDone
from lorasmith.training.flat import FlatParameters
from lorasmith.training.mailbox import Mailbox
from lorasmith.training.optimizers import GatedOptimizer
from lorasmith.training.precision import LossScale

__all__ = ["Recipe", "fit", "prepared", "sample_losses"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the loop needs to know, with every default decided. Meanings as in `TrainConfig`.

    Attributes:
        first_step: steps that the adapters have behind them: draws go on from there, so that a continued LoRA meets new
            noise and the rest of the epoch rather than the beginning again.
        learning_rates: of the module paths where it is not `learning_rate`.
        checkpoint_depth: 0 for no gradient checkpointing.
    """

    steps: int
    first_step: int = 0
    batch_size: int
    accumulation: int
    learning_rate: float
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    lora_plus_ratio: float = 1.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    loss_function: str
    objective: str
    timesteps: str
    timestep_shift: float | None = None
    stratified: bool = True
    loss_weighting: str = "none"
    min_snr_gamma: float = 5.0
    noise_offset: float = 0.0
    zero_terminal_snr: bool = False
    seed: int
    dtype: torch.dtype
    device: torch.device
    checkpoint_depth: int


def fit(
    denoiser: Denoiser,
    adapters: Mapping[str, Adapter],
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    differences: Mapping[str, Difference] | None = None,
    on_event: EventHandler,
    cancelled: Callable[[], bool],
) -> list[float]:
    """Train `adapters` in place.

    Whatever ends the loop, the adapters then hold the fp32 values of the last good step on the CPU, and the model is
    as it was.

    Args:
        denoiser: the model, patches included; they stay frozen.
        adapters: by module path, fp32.
        samples: the dataset.
        recipe: settings.
        differences: of norms and biases, trained along, by module path.
        on_event: receives a `StepDone` per step, late and in order.
        cancelled: asked between steps.

    Returns:
        The loss of each step taken; fewer than `recipe.steps` when cancelled.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    differences = differences or {}
    dropout = Dropout(adapters, rank=recipe.rank_dropout, module=recipe.module_dropout, seed=recipe.seed)
    maker = _batch_maker(denoiser, samples, recipe, dropout)
    losses: list[float] = []
    mailbox = Mailbox(recipe.device)

    def report(*, wait: bool = False) -> None:
        for step, (loss, norm, sound) in mailbox.collect(wait=wait):
            if not sound:
                raise TrainingError(_unsound(maker, step, loss, recipe))
            losses.append(loss)
            on_event(StepDone(step=len(losses), loss=loss, grad_norm=norm))

    with prepared(denoiser, adapters, recipe, differences):
        trained = list(_trained(adapters, differences))
        flat = FlatParameters(
            {name: parameter for _, name, parameter in trained},
            device=recipe.device,
            dtype=recipe.dtype,
            rates={name: _rate(path, name, recipe) for path, name, _ in trained},
        )
        try:
            update = _Update(flat, recipe)
            for step, batches in prefetched(maker, range(recipe.first_step, recipe.first_step + recipe.steps)):
                if cancelled():
                    break
                loss = _accumulate(denoiser, batches, recipe, flat, dropout, update.scale.scale)
                mailbox.post(step, update(loss))
                report()
            report(wait=True)
        finally:
            flat.release()
    return losses


@contextlib.contextmanager
def prepared(
    denoiser: Denoiser,
    adapters: Mapping[str, Adapter],
    recipe: Recipe,
    differences: Mapping[str, Difference] | None = None,
) -> Iterator[None]:
    """The denoiser as it trains: patches applied, weights held, adapters attached, blocks recomputed."""
    module = denoiser.module
    trained = Attached(adapters, differences=differences or {})
    with contextlib.ExitStack() as stack:
        stack.enter_context(merged_weights(module, denoiser.patches))
        stack.enter_context(held(module, device=recipe.device, dtype=recipe.dtype))
        stack.enter_context(attached(module, [*attachments(module, denoiser.patches), trained]))
        stack.enter_context(checkpointed(module, recipe.checkpoint_depth))
        yield


def sample_losses(denoiser: Denoiser, batch: Batch, recipe: Recipe) -> Tensor:
    """Loss of each sample of a batch, (batch,) fp32, with the graph to the adapters."""
    prediction = denoiser.predict(batch.noised.to(recipe.dtype), batch.level.time, batch.conditioning)
    return diffusion_loss(
        prediction,
        clean=batch.clean,
        noise=batch.noise,
        noised=batch.noised,
        level=batch.level,
        parameterization=denoiser.base.components.parameterization,
        objective=recipe.objective,
        loss_function=recipe.loss_function,
        weighting=recipe.loss_weighting,
        gamma=recipe.min_snr_gamma,
    )


def _accumulate(
    denoiser: Denoiser,
    batches: Sequence[Batch],
    recipe: Recipe,
    flat: FlatParameters,
    dropout: Dropout,
    scale: Tensor,
) -> Tensor:
    """Gradients of a step into `flat.grad`; returns the mean loss over the step's samples."""
    flat.grad.zero_()
    per_step = recipe.batch_size * recipe.accumulation
    losses = []
    for batch in batches:
        with dropout.applied(batch.masks):  # until the backward pass is over, which may compute blocks again
            loss = sample_losses(denoiser, batch, recipe)
            torch.autograd.backward(loss.sum() * (scale / per_step))
        flat.collect()
        losses.append(loss.detach())
    return torch.cat(losses).mean()


class _Update:
    """One optimizer update from the accumulated gradients, gated on the device."""

    def __init__(self, flat: FlatParameters, recipe: Recipe) -> None:
        self._flat = flat
        self._max_norm = recipe.max_grad_norm
        self.scale = LossScale(recipe.device, enabled=recipe.dtype == torch.float16)
        self._sound = torch.ones((), dtype=torch.bool, device=recipe.device)
        self._optimizer = GatedOptimizer(recipe.optimizer, flat.groups, weight_decay=recipe.weight_decay)

    def __call__(self, loss: Tensor) -> Tensor:
        """Update the master weights; returns (loss, gradient norm, whether all was finite so far)."""
        grad = self._flat.grad
        if self.scale.enabled:
            grad.div_(self.scale.scale)
        norm = torch.linalg.vector_norm(grad)
        finite = norm.isfinite()
        # An overflow of scaled fp16 gradients is routine and only skips the step. Anything else stops the run: the
        # flag stays down, so that no later step moves the weights before the host has heard of it.
        self._sound = self._sound & loss.isfinite() & (finite | self.scale.enabled)
        if self._max_norm:
            grad.mul_((self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._optimizer.step(self._sound & finite)
        self.scale.update(finite)
        self._flat.publish()
        return torch.stack((loss, norm, self._sound.to(loss.dtype)))


def _batch_maker(
    denoiser: Denoiser, samples: Sequence[Sample], recipe: Recipe, dropout: Dropout | None = None
) -> BatchMaker:
    schedule = denoiser.base.components.schedule
    if recipe.zero_terminal_snr:
        schedule = schedule.zero_terminal()
    return BatchMaker(
        samples=samples,
        schedule=schedule,
        quantiles=quantile_map(recipe.timesteps, recipe.timestep_shift, schedule),
        stratified=recipe.stratified,
        noise_offset=recipe.noise_offset,
        seed=recipe.seed,
        repeatable_context=denoiser.base.family.repeatable_context,
        batch_size=recipe.batch_size,
        accumulation=recipe.accumulation,
        device=recipe.device,
        dtype=recipe.dtype,
        memory_format=memory_format_for(denoiser.module),
        masks=no_masks if dropout is None else dropout.masks,
    )


def _trained(
    adapters: Mapping[str, Adapter], differences: Mapping[str, Difference]
) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """Module path, full name and parameter of everything that is trained."""
    for path, adapter in adapters.items():
        yield from ((path, f"{path}.{name}", parameter) for name, parameter in adapter.named_parameters())
    for path, one in differences.items():
        yield from ((path, f"{path}.difference.{name}", parameter) for name, parameter in one.named_parameters())


def _rate(path: str, name: str, recipe: Recipe) -> float:
    """The learning rate of a parameter; LoRA+ has a higher one for up matrices."""
    rate = recipe.learning_rates.get(path, recipe.learning_rate)
    return rate * recipe.lora_plus_ratio if name.endswith(".up") else rate


def _unsound(maker: BatchMaker, step: int, loss: float, recipe: Recipe) -> str:
    first = step * maker.per_step
    names = dict.fromkeys(maker.sample(draw).name for draw in range(first, first + maker.per_step))
    what = "gradient" if torch.tensor(loss).isfinite() else "loss"
    taken = step - recipe.first_step
    return (
        f"the {what} must stay finite but became NaN or infinite at step {taken + 1} (images: {', '.join(names)}); "
        f"the LoRA of step {taken} is kept; try a learning rate below {recipe.learning_rate:g}"
        + (", or training_dtype fp32" if recipe.dtype != torch.float32 else "")
    )
