"""The training step: updates adapters on a frozen denoiser from batches of samples.

The engine needs only a module and its predict function, so it also trains models that another program loaded. No step
synchronizes with the device: losses reach the host late, and a flag on the device keeps non-finite ones out of the
weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.inject import Attached, Dial, Difference, adapters_attached
from lorasmith.adapters.variants import RankMasks, StartedAdapter
from lorasmith.core.effect import relative_change
from lorasmith.core.errors import TrainingError
from lorasmith.core.kept_values import changes_intercepted
from lorasmith.core.placement import memory_format_for
from lorasmith.core.power_average import LENGTHS, exponent, kept_share
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.diffusion.loss_functions import may_ask_frozen
from lorasmith.diffusion.losses import check_losses, compared
from lorasmith.diffusion.schedule import quantile_map, quantile_range, range_limited
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.token_routing import tokens_routed
from lorasmith.training.attention import attention_preferred
from lorasmith.training.batches import Batch, BatchMaker, no_masks
from lorasmith.training.config import WHOLE_RANGE, ResolvedConfig
from lorasmith.training.cuda_graphs import CudaGraphs
from lorasmith.training.memory.activations import activations_packed, activations_reduced, blocks_checkpointed
from lorasmith.training.memory.compilation import blocks_compiled
from lorasmith.training.methods.all_methods import check_opposites, methods_of, other_texts
from lorasmith.training.methods.method import Goal, Passes, prediction_losses
from lorasmith.training.new_word import NEW_WORD, NewWord
from lorasmith.training.optim.flat import FlatParameters, GradientSums
from lorasmith.training.optim.optimizers import GatedOptimizer, LossScale, check_alike
from lorasmith.training.token_routes import TokenRoutes
from lorasmith.training.trainable import Trainable
from lorasmith.training.way import Way


@contextlib.contextmanager
def prepared(
    model: Trainable,
    adapters: Mapping[str, Adapter],
    config: ResolvedConfig,
    way: Way,
    differences: Mapping[str, Difference] | None = None,
    *,
    strength: float | Dial = 1.0,
    text_adapters: Mapping[str, Adapter] | None = None,
    first: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Inside the context, the denoiser is ready for steps: frozen, adapters attached, blocks checkpointed and compiled.

    `text_adapters` are those of `model.encoders`, which are frozen and checkpointed as the denoiser is. `first` is
    called with the denoiser frozen, before adapters are attached.
    """
    with model.frozen(config, way):
        first()
        with attached(model, Attached(adapters, strength, differences or {}), way, text_adapters or {}):
            yield


@contextlib.contextmanager
def adapted(model: Trainable, trained: Attached, text_adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Inside the context, adapters are attached to a frozen denoiser and its text encoders."""
    with contextlib.ExitStack() as stack:
        if model.encoders is not None:
            stack.enter_context(adapters_attached(model.encoders, [Attached(text_adapters, trained.strength)]))
            stack.enter_context(model.texts_read(trained.strength))
        stack.enter_context(adapters_attached(model.module, [trained]))
        yield


@contextlib.contextmanager
def attached(model: Trainable, trained: Attached, way: Way, text_adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Inside the context, a frozen denoiser is `prepared`."""
    module, encoders = model.module, model.encoders
    changes = changes_in_place(model, way) or way.activations in ("lean", "selective")
    with (
        adapted(model, trained, text_adapters),
        contextlib.nullcontext() if encoders is None else blocks_checkpointed(encoders, way.checkpoint_depth),
        changes_intercepted() if changes else contextlib.nullcontext(),
        attention_preferred(way.attention),
        activations_reduced(module, way.activations, compiled=way.compile),
        blocks_checkpointed(module, way.checkpoint_depth, kept=way.kept_blocks, compiled=way.compile),
        blocks_compiled(module, way.compile, varying_sizes=way.varying_sizes),
    ):
        yield


def changes_in_place(model: Trainable, way: Way) -> bool:
    """Whether a forward pass may change tensors that its backward pass needs; compiled code changes none."""
    return model.changes_in_place and not way.compile


def prediction_of(model: Trainable, batch: Batch, way: Way, conditioning: Conditioning | None = None) -> Tensor:
    """The model's prediction for a batch, of the latents' shape, differentiable like `sample_losses`.

    `conditioning` replaces the batch's.
    """
    conditioning = batch.conditioning if conditioning is None else conditioning
    with (
        activations_packed(way.activations, model.module, watched=changes_in_place(model, way)),
        tokens_routed(model.module, model.routing, batch.route, conditioning),
    ):
        return model.predict(batch.noised.to(way.dtype), batch.level.time, conditioning)


def sample_losses(
    model: Trainable, batch: Batch, config: ResolvedConfig, way: Way, target: Tensor | None = None
) -> Tensor:
    """Loss of each sample, (batch,) fp32, differentiable in the parameters of the attached adapters."""
    prediction = prediction_of(model, batch, way)
    return prediction_losses(prediction, batch, config, model.diffusion.parameterization, target)


class Engine:
    """A denoiser with fp32 adapters and the training state: weights, their average, optimizer and loss scale.

    Trained parameters are views of a flat buffer until `release`. `rate_factor` multiplies the scheduled learning rate.
    Draws start behind those of `steps_before`, of a continued LoRA, so that it gets new noise and the rest of the
    epoch; `learning_rates` are by module path, where not the configuration's.
    """

    def __init__(
        self,
        model: Trainable,
        adapters: Mapping[str, Adapter],
        config: ResolvedConfig,
        way: Way,
        differences: Mapping[str, Difference] | None = None,
        text_adapters: Mapping[str, Adapter] | None = None,
        *,
        steps_before: int = 0,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.way = way
        self.steps_before = steps_before
        self.rate_factor = 1.0
        self.rank_masks = RankMasks(
            adapters,
            rank_dropout=config.rank_dropout,
            module_dropout=config.module_dropout,
            seed=config.seed,
            schedule=config.rank_schedule,
        )
        self.methods = methods_of(config)
        self.is_penalized = True  # by the methods, in the gradient
        self._dial = Dial()
        self._asks_frozen = may_ask_frozen(config.loss_function)
        is_dialed = self.methods or self._asks_frozen
        self.trained = Attached(adapters, self._dial if is_dialed else 1.0, differences or {})
        self.text_adapters = text_adapters or {}
        self.started = {
            path: part
            for path, adapter in self._all_adapters.items()
            for part in adapter.modules()
            if type(part) is StartedAdapter
        }
        self.has_starts = torch.tensor(not self.started)  # whether their starts are set
        word = None if config.new_word is None else model.word
        named = list(_trained(self._all_adapters, self.trained.differences, word))
        self._names = [(path, name) for path, name, _ in named]
        self.flat = FlatParameters(
            {name: parameter for _, name, parameter in named},
            device=way.device,
            dtype=way.dtype,
            rates={name: _rate(path, name, config, learning_rates or {}) for path, name, _ in named},
        )
        # Steps of the run after which parameters keep their values.
        last = {NEW_WORD: config.new_word_steps, **dict.fromkeys(self.text_adapters, config.text_encoder_steps)}
        self._last = {name: steps for path, name, _ in named if (steps := last.get(path)) is not None}
        self._optimizer = GatedOptimizer(
            config.optimizer, self.flat.groups, weight_decay=config.weight_decay, arguments=config.optimizer_args
        )
        self._scale = LossScale(way.device, enabled=way.dtype == torch.float16)
        self._average = self.flat.master.clone() if config.ema_decay else None
        # (lengths, numbers) fp32, see `core.power_average`
        self.power_averages = self.flat.master.repeat(len(LENGTHS), 1) if config.post_hoc_ema else None
        self._sound = torch.ones((), dtype=torch.bool, device=way.device)
        self._sums = GradientSums(self.flat, way.processes) if way.processes.size > 1 else None
        self._graphs: CudaGraphs | None = None

    @contextlib.contextmanager
    def prepared(self, first: Callable[[], None] = lambda: None) -> Iterator[None]:
        with self.frozen():
            first()
            with self.attached():
                yield

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        return self.model.frozen(self.config, self.way)

    def adapted(self) -> contextlib.AbstractContextManager[None]:
        return adapted(self.model, self.trained, self.text_adapters)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with attached(self.model, self.trained, self.way, self.text_adapters):
            self._graphs = CudaGraphs(self.flat.grad) if self.way.cuda_graphs else None
            try:
                yield
            finally:
                self._graphs = None

    def factor_at(self, step: int) -> float:
        """Factor of all learning rates at a step of the run, counted from 0: `rate_factor` times the schedule's."""
        return self.rate_factor * self.config.scheduled(step)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step; layers with rates of their own have theirs times `factor_at`."""
        return self.config.learning_rate * self.factor_at(step)

    def gradient(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Compute the gradient of a step into the flat buffer; may be repeated after running out of memory.

        Returns the losses, (samples,) fp32, and the norm of the first batch's gradient (0 with a single batch). With
        several processes, this covers the process's own samples, and `summed` must follow in all of them.
        """
        flat, sums = self.flat, self._sums
        flat.zero()
        if self._last:
            step = batches[0].draws[0] // self.config.samples_per_step - self.steps_before
            for name, last in self._last.items():
                flat.parameters[name].requires_grad_(step < last)
        per_step = self.config.samples_per_step if sums else sum(len(batch.names) for batch in batches)
        if self.way.processes.is_first and self.is_penalized:
            for method in self.methods:
                penalty = method.penalty(self._all_adapters)
                if penalty is not None:
                    torch.autograd.backward(penalty * self._scale.scale)
                    flat.collect()
                del penalty  # its nodes would take their stream into a capture
        losses = []
        first = None
        for index, batch in enumerate(batches):
            is_last, is_only = index == len(batches) - 1, len(batches) == 1
            reduced = sums.during_backward(norm=is_only) if sums and is_last else None
            run = partial(self._accumulated, per_step=per_step, reduced=reduced)
            loss = run(batch) if self._graphs is None else self._graphs.run(batch, run)
            if batch.names:  # without names it is padding, see `BatchMaker.step`
                losses.append(loss)
            if first is None and not is_only:
                first = torch.linalg.vector_norm(flat.grad)
        return torch.cat(losses), torch.zeros_like(self._scale.scale) if first is None else first

    def _accumulated(
        self, batch: Batch, per_step: int, reduced: contextlib.AbstractContextManager[None] | None
    ) -> Tensor:
        """Add the gradient of a batch to the flat buffer, unless it is `reduced` within that context; its losses."""
        if self._asks_frozen:
            batch = batch.asking(self._frozen_prediction)
        # Until the backward passes end, as they may recompute blocks.
        with self.rank_masks.masks_applied(batch.masks):
            goal, loss = self._passes(batch, per_step)
            with reduced or contextlib.nullcontext():
                if loss is None:
                    loss = sample_losses(self.model, goal.batch, self.config, self.way, goal.target)
                    self._backward(loss, batch, per_step)
        if reduced is None:
            self.flat.collect()
        return loss.detach()

    def _frozen_prediction(self, batch: Batch) -> Tensor:
        """What `objective` compares of the frozen model's prediction, fp32 of the latents' shape."""
        with torch.no_grad(), self._dial.turned(0.0):
            prediction = prediction_of(self.model, batch, self.way)
        parameterization, objective = self.model.diffusion.parameterization, self.config.objective
        return compared(prediction, batch, parameterization=parameterization, objective=objective)

    def _passes(self, batch: Batch, per_step: int) -> tuple[Goal, Tensor | None]:
        """The goal of the batch's prediction after the methods' terms, whose gradients are added.

        Where the terms replace that prediction, their sum is returned, too.
        """
        goal, replacing = Goal(batch), None
        if not self.methods:
            return goal, replacing

        def predict(drawn: Batch, conditioning: Conditioning) -> Tensor:
            return prediction_of(self.model, drawn, self.way, conditioning)

        passes = Passes(batch, self.model.diffusion.parameterization, predict, self._dial, are_equal=self.way.sharding)
        for method in self.methods:
            goal = method.goal(goal, passes)
            for term in method.terms(passes):
                check_losses(term, len(batch.clean), f"a term of {method.name}")
                self._backward(term, batch, per_step)
                if method.replaces_goal:
                    replacing = term.detach() if replacing is None else replacing + term.detach()
        return goal, replacing

    def _backward(self, losses: Tensor, batch: Batch, per_step: int) -> None:
        if not losses.requires_grad:
            raise TrainingError(
                "the prediction must depend on a trained layer, and it depends on none; choose targets that the "
                "network calls, and predict without no_grad or detach"
            )
        torch.autograd.backward(self.summed_loss(losses, batch, per_step))

    def summed_loss(self, losses: Tensor, batch: Batch, per_step: int) -> Tensor:
        """The scalar that a batch's backward pass starts from; `per_step` is the number of samples of the step."""
        total = losses.sum() if batch.weights is None else losses @ batch.weights
        return total * (self._scale.scale / per_step)

    @property
    def loss_scale(self) -> Tensor:
        """Factor of losses in the backward pass, which `update` divides by; 1 unless products are in fp16."""
        return self._scale.scale

    def allow_updates(self) -> None:
        """Let steps change the weights again after one that was not finite."""
        self._sound.fill_(True)

    def restore_base_model(self, *, frozen: bool = False) -> None:
        """Called outside of `attached` before something uses the frozen model, or outside of `frozen` the bare one."""

    def summed(self, batches: Sequence[Batch], own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Sum the gradient over all processes, each of which calls this once per step.

        `own` is the result of `gradient`, None if it failed here. Returns what `gradient` returns in a single process:
        the losses of all samples in draw order, and the norm of the first process's first batch.
        """
        sums, processes = self._sums, self.way.processes
        if sums is None:
            assert own is not None
            return own
        per_step = self.config.samples_per_step
        shared = torch.zeros(per_step + 1, device=self.way.device)  # losses, and the norm
        sums.finish()
        if own is not None:
            losses, first = own
            places = torch.tensor([draw % per_step for batch in batches for draw in batch.draws])
            shared[places.to(shared.device, non_blocking=True)] = losses
            if processes.is_first:
                shared[-1] = sums.own_norm if len(batches) == 1 else first
        processes.summing(shared)()
        return shared[:-1], shared[-1]

    def check_same_weights(self) -> None:
        """Raise TrainingError if the weights of the processes differ in any bit."""
        processes = self.way.processes
        if processes.size == 1:
            return
        sums = processes.gathered(int(self.flat.master.view(torch.int32).sum(dtype=torch.int64)))
        if len(set(sums)) > 1:
            raise TrainingError(
                f"the {processes.size} processes of a run must have the same weights, but they differ; train on "
                "devices of one kind with the same versions of torch and its libraries"
            )

    def update(self, step: int, losses: Tensor, first: Tensor) -> Tensor:
        """One optimizer update from the results of `gradient`, gated on the device.

        Returns fp32 on the device: `(sound, gradient norm, norm of the first batch's gradient, losses …)`. From the
        first step with a non-finite loss or gradient, `sound` is 0 and the weights do not change until `load`.
        """
        grad, config = self.flat.grad, self.config
        if self._scale.enabled:
            grad.div_(self._scale.scale)
            first = first / self._scale.scale
        norm = torch.linalg.vector_norm(grad)
        finite = norm.isfinite()
        # An overflow of scaled fp16 gradients is routine and only skips the step while the scale can be lowered.
        # Anything else is decided on the host: the flag stays down, so that no later step updates the weights first.
        self._sound = self._sound & losses.isfinite().all() & (finite | (self._scale.scale > 1))
        if config.max_grad_norm:
            # A norm that is not finite leaves the others as they are, for `non_finite_gradients`.
            grad.mul_(torch.where(finite, (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), 1.0))
        proceed = self._sound & finite
        stopped = [self.flat.view(self.flat.master, name) for name, last in self._last.items() if step >= last]
        kept = [parameter.clone() for parameter in stopped]
        self._optimizer.step(proceed, self.factor_at(step))
        for parameter, before in zip(
            stopped, kept, strict=True
        ):  # momentum and decay change weights without a gradient
            parameter.copy_(before)
        self._scale.update(finite)
        if self._average is not None:
            # Early on the decay is smaller, as in torch and timm.
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            self._average.lerp_(self.flat.master, (1 - decay) * proceed)
        if self.power_averages is not None:
            for average, length in zip(self.power_averages, LENGTHS, strict=True):
                average.lerp_(self.flat.master, 1 - kept_share(step + 1, exponent(length)))
        self.flat.publish()
        return torch.cat((torch.stack((self._sound.to(losses.dtype), norm, first)), losses))

    def non_finite_gradients(self) -> Iterator[str]:
        """Paths of the layers whose last gradient has NaN or infinity, in the model's order.

        On a GPU, where a step's results arrive late, that is the gradient of the step after it, of the same weights.
        """
        flat = self.flat
        bad = [path for path, name in self._names if not flat.view(flat.grad, name).isfinite().all()]
        yield from dict.fromkeys(bad)

    @torch.no_grad()
    def relative_changes(self) -> Iterator[float | None]:
        """By how much the values in the adapters change each weight, relative to it; None for a word's vectors.

        On the CPU, inside of `exported`; each item reads a weight of the frozen model, so that callers stop early.
        """
        if self.model.word is not None:
            yield None
        for network, adapters in (
            (self.model.module, self.trained.adapters),
            (self.model.encoders, self.text_adapters),
        ):
            for path, adapter in adapters.items():
                assert network is not None
                weight = FrozenLayer(network.get_submodule(path)).weight.detach().cpu().float()
                yield relative_change(weight, adapter.merged(weight))
        for path, difference in self.trained.differences.items():
            for name, change in difference.named_parameters():
                before = getattr(self.model.module.get_submodule(path), name).detach().cpu().float()
                yield relative_change(before, before + change)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """CPU copies of all tensors that a step changes, and the remaining state as JSON values."""
        tensors, numbers = self._optimizer.state()
        named = {**{f"optimizer.{name}": tensor for name, tensor in tensors.items()}, **self._own_state()}
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
        return state, {"optimizer": copy.deepcopy(numbers), "rate_factor": self.rate_factor}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restore what `state` returned, bit for bit. Raises TrainingError and KeyError if it is of another engine."""
        optimizer = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
        self._optimizer.load(optimizer, copy.deepcopy(numbers["optimizer"]))
        for name, tensor in self._own_state().items():
            check_alike(tensors[name], tensor)
            tensor.copy_(tensors[name])
        self.rate_factor = numbers["rate_factor"]
        self.flat.publish()
        self.allow_updates()

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[Tensor]:
        """The weights to be saved (the moving average, if any) are in the parameters; yields their flat fp32 buffer."""
        trained = self.flat.master.clone()
        with self._optimizer.evaluation_weights():
            try:
                if self._average is not None:
                    self.flat.master.copy_(self._average)
                self.flat.publish()
                yield self.flat.master
            finally:
                self.flat.master.copy_(trained)
        self.flat.master.copy_(trained)  # schedule-free optimizers do not restore the last bits
        self.flat.publish()

    @contextlib.contextmanager
    def exported(self, values: Tensor | None = None) -> Iterator[None]:
        """The adapters hold the weights to be saved, or `values` from `evaluation_weights`, in fp32 on the CPU."""
        with contextlib.ExitStack() as stack:
            if values is None:
                values = stack.enter_context(self.evaluation_weights())
            stack.enter_context(self.flat.parameters_replaced(values))
            yield

    def release(self, values: Tensor | None = None) -> None:
        """Leave the weights to be saved, or `values`, in the adapters, in fp32 on the CPU."""
        if values is None:
            with self.evaluation_weights() as values:
                values = values.clone()
        self.flat.master.copy_(values)
        self.flat.release()

    @property
    def _all_adapters(self) -> Mapping[str, Adapter]:
        return {**self.trained.adapters, **self.text_adapters}

    def _own_state(self) -> dict[str, Tensor]:
        average = {} if self._average is None else {"average": self._average}
        if self.power_averages is not None:
            average["power_averages"] = self.power_averages
        starts = {
            f"start.{path}.{name}": tensor
            for path, adapter in self.started.items()
            for name, tensor in zip(("down", "up"), adapter.start, strict=True)
        }
        if starts:
            starts["has_starts"] = self.has_starts
        return {"master": self.flat.master, **average, **starts, **self._scale.tensors}


def batch_maker(
    model: Trainable,
    samples: Sequence[Sample] | EncodedDataset,
    config: ResolvedConfig,
    way: Way,
    rank_masks: RankMasks | None = None,
) -> BatchMaker:
    """The `BatchMaker` of a run; `rank_masks` are of its adapters.

    Raises OptionError if a method of the settings needs a text encoder, and `samples` are no dataset that has one, or
    if it needs opposites that samples lack, or the other way round.
    """
    check_opposites(samples, config)
    schedule = model.diffusion.schedule
    if config.zero_terminal_snr:
        schedule = schedule.zero_terminal()
    quantiles = quantile_map(config.timesteps, config.timestep_shift, schedule)
    if config.noise_range != WHOLE_RANGE:
        quantiles = range_limited(quantiles, *quantile_range(schedule, *config.noise_range))
    routes = TokenRoutes.of(model, config)
    return BatchMaker(
        samples=samples.samples if isinstance(samples, EncodedDataset) else samples,
        schedule=schedule,
        quantiles=quantiles,
        join=model.join,
        # A route is of one call of the network.
        lengths_apart=(way.sharding or routes is not None) and model.facts.predicts_by_length,
        memory_format=memory_format_for(model.module),
        masks=no_masks if rank_masks is None else rank_masks.masks,
        texts=other_texts(samples, config),
        routes=routes,
        config=config,
        way=way,
    )


def _trained(
    adapters: Mapping[str, Adapter], differences: Mapping[str, Difference], word: NewWord | None
) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """Module path, full name and parameter of every trained parameter."""
    for path, adapter in adapters.items():
        yield from ((path, f"{path}.{name}", parameter) for name, parameter in adapter.named_parameters())
    for path, difference in differences.items():
        yield from ((path, f"{path}.difference.{name}", parameter) for name, parameter in difference.named_parameters())
    if word is not None:
        yield from ((NEW_WORD, f"{NEW_WORD}.{name}", parameter) for name, parameter in word.vectors.named_parameters())


def _rate(path: str, name: str, config: ResolvedConfig, own: Mapping[str, float]) -> float:
    """The learning rate of a parameter; LoRA+ has a higher one for up matrices."""
    rate = own.get(path, config.learning_rate)
    return rate * config.lora_plus_ratio if name.endswith(".up") else rate
