"""The training step: adapters on a denoiser, moved by batches of samples.

The engine knows a denoiser as a module and a predict function, so it trains models that another program loaded as well
as ours. Nothing in a step waits for the device: losses come to the host late, and a non-finite one has by then been
kept out of the weights by a flag on the device. The loop around it is in `loop`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.difference import Difference
from lorasmith.adapters.dropout import Dropout
from lorasmith.adapters.inject import Attached, attached
from lorasmith.adapters.patch import attachments, merged_weights
from lorasmith.core.placement import held, memory_format_for, reproducible
from lorasmith.data.dataset import Sample
from lorasmith.diffusion.losses import diffusion_loss
from lorasmith.diffusion.timesteps import quantile_map
from lorasmith.families.model import Denoiser
from lorasmith.training.batches import Batch, BatchMaker, no_masks
from lorasmith.training.memory.activation_checkpointing import checkpointed
from lorasmith.training.memory.activations import economical, sparing
from lorasmith.training.memory.compilation import compiled
from lorasmith.training.memory.frozen_weights import kept, multiplied_in_fp8
from lorasmith.training.memory.weight_stream import WeightStream
from lorasmith.training.optim.flat import FlatParameters
from lorasmith.training.optim.loss_scale import LossScale
from lorasmith.training.optim.optimizers import GatedOptimizer
from lorasmith.training.optim.schedules import rate_factor

__all__ = ["Engine", "Recipe", "batch_maker", "frozen", "prepared", "sample_losses"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What engine and loop need to know, with every default decided. Meanings as in `TrainConfig`.

    Attributes:
        first_step: steps that the adapters have behind them: draws go on from there, so that a continued LoRA meets new
            noise and the rest of the epoch rather than the beginning again.
        learning_rates: of the module paths where it is not `learning_rate`.
        micro_batch: images per forward pass, when memory is too small for `batch_size`.
        checkpoint_depth: 0 for no gradient checkpointing.
        activations: what the rest keeps for the backward pass, of `activations.KINDS`; `auto` is decided by a
            measurement before the first step.
        memory_budget: bytes on the device that `auto` may plan with, weights included; None for what is free.
        quantization: how frozen weights are kept, of `PACKINGS`.
        offloading: whether they wait in host memory.
        quantized_backward: whether products with weights in fp8 are in fp8.
        compile: whether blocks run compiled, unless weights are streamed in.
        varying_sizes: whether compiled code is for any size of latents.
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
    optimizer_args: str | None = None
    weight_decay: float
    schedule: str = "constant"
    warmup_steps: int = 0
    final_rate: float = 0.0
    schedule_cycles: int = 1
    schedule_power: float = 1.0
    ema_decay: float = 0.0
    max_grad_norm: float
    max_rollbacks: int = 0
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
    deterministic: bool = False
    micro_batch: int | None = None
    checkpoint_depth: int
    activations: str = "keep"
    memory_budget: int | None = None
    quantization: str = "none"
    offloading: bool = False
    quantized_backward: bool = False
    compile: bool = False
    varying_sizes: bool = False


@contextlib.contextmanager
def frozen(denoiser: Denoiser, recipe: Recipe) -> Iterator[None]:
    """The denoiser as training finds it: patches applied, weights quantized or offloaded where asked for, or held."""
    module = denoiser.module
    with contextlib.ExitStack() as stack:
        stack.enter_context(reproducible(recipe.deterministic))
        stack.enter_context(merged_weights(module, denoiser.patches, dtype=torch.float32))
        kind, device, dtype = recipe.quantization, recipe.device, recipe.dtype
        stream = WeightStream(device) if recipe.offloading else None
        packed = stack.enter_context(kept(module, kind=kind, device=device, dtype=dtype, stream=stream))
        stack.enter_context(held(module, device=device, dtype=dtype, without=packed))
        if recipe.quantized_backward:
            stack.enter_context(multiplied_in_fp8(module))
        stack.enter_context(attached(module, attachments(module, denoiser.patches)))
        yield


@contextlib.contextmanager
def prepared(
    denoiser: Denoiser,
    adapters: Mapping[str, Adapter],
    recipe: Recipe,
    differences: Mapping[str, Difference] | None = None,
    *,
    first: Callable[[], None] = lambda: None,
    planned: Callable[[], Recipe] | None = None,
) -> Iterator[None]:
    """The denoiser as it trains: frozen, adapters attached, blocks recomputed, and compiled.

    `first` is called when it is frozen and the adapters are not attached yet; `planned` when they are, for the recipe
    by which activations are kept, if that is not decided yet.
    """
    module = denoiser.module
    trained = Attached(adapters, differences=differences or {})
    with frozen(denoiser, recipe):
        first()
        with attached(module, [trained]):
            recipe = recipe if planned is None else planned()
            with (
                sparing(module, recipe.activations),
                checkpointed(module, recipe.checkpoint_depth),
                compiled(module, recipe.compile and not recipe.offloading, varying_sizes=recipe.varying_sizes),
            ):
                yield


def sample_losses(denoiser: Denoiser, batch: Batch, recipe: Recipe) -> Tensor:
    """Loss of each sample of a batch, (batch,) fp32, with the graph to the adapters."""
    with economical(recipe.activations, denoiser.module):
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


class Engine:
    """A denoiser with adapters, and all that a step changes: weights, their average, the optimizer, the loss scale.

    Args:
        denoiser: the model, patches included; they stay frozen.
        adapters: by module path, fp32. Their parameters live in a flat buffer until `release`.
        recipe: settings.
        differences: of norms and biases, trained along, by module path.

    Attributes:
        rate_factor: what the learning rate is multiplied by besides the schedule.
        recipe: as given, but for what running out of memory has changed.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        adapters: Mapping[str, Adapter],
        recipe: Recipe,
        differences: Mapping[str, Difference] | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.recipe = recipe
        self.rate_factor = 1.0
        self.dropout = Dropout(adapters, rank=recipe.rank_dropout, module=recipe.module_dropout, seed=recipe.seed)
        self._trained = Attached(adapters, differences=differences or {})
        named = list(_trained(adapters, self._trained.differences))
        self.flat = FlatParameters(
            {name: parameter for _, name, parameter in named},
            device=recipe.device,
            dtype=recipe.dtype,
            rates={name: _rate(path, name, recipe) for path, name, _ in named},
        )
        self._optimizer = GatedOptimizer(
            recipe.optimizer, self.flat.groups, weight_decay=recipe.weight_decay, arguments=recipe.optimizer_args
        )
        self._scale = LossScale(recipe.device, enabled=recipe.dtype == torch.float16)
        self._average = self.flat.master.clone() if recipe.ema_decay else None
        self._sound = torch.ones((), dtype=torch.bool, device=recipe.device)

    def prepared(
        self, first: Callable[[], None], planned: Callable[[], Recipe] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """The denoiser as it trains; see the function of this name."""
        trained = self._trained
        return prepared(self.denoiser, trained.adapters, self.recipe, trained.differences, first=first, planned=planned)

    def rate(self, step: int) -> float:
        """What learning rates are multiplied by at a step of the run, counted from 0."""
        recipe = self.recipe
        return self.rate_factor * rate_factor(
            step,
            schedule=recipe.schedule,
            steps=recipe.steps,
            warmup_steps=recipe.warmup_steps,
            final_rate=recipe.final_rate,
            cycles=recipe.schedule_cycles,
            power=recipe.schedule_power,
        )

    def gradient(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """The gradient of a step, into the flat buffer; can be asked for again if memory runs out.

        Returns:
            The samples' losses, (samples,) fp32, and the norm of the first batch's share (0 if there is only one).
        """
        flat, recipe = self.flat, self.recipe
        flat.zero()
        per_step = sum(len(batch.names) for batch in batches)
        losses = []
        first = None
        for batch in batches:
            with self.dropout.applied(batch.masks):  # until the backward pass is over, which may compute blocks again
                loss = sample_losses(self.denoiser, batch, recipe)
                torch.autograd.backward(loss.sum() * (self._scale.scale / per_step))
            flat.collect()
            losses.append(loss.detach())
            if first is None and len(batches) > 1:
                first = torch.linalg.vector_norm(flat.grad)
        return torch.cat(losses), torch.zeros_like(self._scale.scale) if first is None else first

    def update(self, step: int, losses: Tensor, first: Tensor) -> Tensor:
        """One optimizer update from the gradient, gated on the device.

        Args:
            step: of the run, counted from 0.
            losses, first: what `gradient` returned.

        Returns:
            fp32 on the device: `(sound, gradient norm, norm of the first batch's share, losses …)`. From the first step
            on whose loss or gradient was not finite `sound` is 0 and the weights stay, until `load`.
        """
        grad, recipe = self.flat.grad, self.recipe
        if self._scale.enabled:
            grad.div_(self._scale.scale)
            first = first / self._scale.scale
        norm = torch.linalg.vector_norm(grad)
        finite = norm.isfinite()
        # An overflow of scaled fp16 gradients is routine and only skips the step, as long as there is scale to lower.
        # Anything else is for the host to decide on: the flag stays down, so that no later step moves the weights
        # before it has heard.
        self._sound = self._sound & losses.isfinite().all() & (finite | (self._scale.scale > 1))
        if recipe.max_grad_norm:
            grad.mul_((recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        proceed = self._sound & finite
        self._optimizer.step(proceed, self.rate(step))
        self._scale.update(finite)
        if self._average is not None:
            # Young averages forget their start sooner, as in torch's and timm's.
            decay = min(recipe.ema_decay, (1 + step) / (10 + step))
            self._average.lerp_(self.flat.master, (1 - decay) * proceed)
        self.flat.publish()
        return torch.cat((torch.stack((self._sound.to(losses.dtype), norm, first)), losses))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies on the CPU of everything that a step changes, and the numbers that go with it (as JSON has them)."""
        tensors, numbers = self._optimizer.state()
        named = {**{f"optimizer.{name}": tensor for name, tensor in tensors.items()}, **self._own_state()}
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
        return state, {"optimizer": copy.deepcopy(numbers), "rate_factor": self.rate_factor}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go to a state that `state` gave, to the bit."""
        optimizer = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
        self._optimizer.load(optimizer, copy.deepcopy(numbers["optimizer"]))
        for name, tensor in self._own_state().items():
            tensor.copy_(tensors[name])
        self.rate_factor = numbers["rate_factor"]
        self.flat.publish()
        self._sound.fill_(True)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Tensor]:
        """The weights as they would be saved (the average, if there is one), in place; yields the fp32 buffer."""
        trained = self.flat.master.clone()
        with self._optimizer.evaluating():
            try:
                if self._average is not None:
                    self.flat.master.copy_(self._average)
                self.flat.publish()
                yield self.flat.master
            finally:
                self.flat.master.copy_(trained)
        self.flat.master.copy_(trained)  # schedule-free optimizers come back with other last bits
        self.flat.publish()

    @contextlib.contextmanager
    def exported(self, values: Tensor | None = None) -> Iterator[None]:
        """The adapters hold what would be saved, or `values` (a buffer from `evaluating`), in fp32 on the CPU."""
        with contextlib.ExitStack() as stack:
            if values is None:
                values = stack.enter_context(self.evaluating())
            stack.enter_context(self.flat.standing_in(values))
            yield

    def release(self, values: Tensor | None = None) -> None:
        """End: the adapters keep what would be saved, or `values`, in fp32 on the CPU."""
        if values is None:
            with self.evaluating() as values:
                values = values.clone()
        self.flat.master.copy_(values)
        self.flat.release()

    def _own_state(self) -> dict[str, Tensor]:
        average = {} if self._average is None else {"average": self._average}
        return {"master": self.flat.master, **average, **self._scale.tensors}


def batch_maker(
    denoiser: Denoiser, samples: Sequence[Sample], recipe: Recipe, dropout: Dropout | None = None
) -> BatchMaker:
    """What makes the batches of a run's steps."""
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
        join=denoiser.base.family.join,
        batch_size=recipe.batch_size,
        accumulation=recipe.accumulation,
        device=recipe.device,
        dtype=recipe.dtype,
        micro_batch=recipe.micro_batch,
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
