"""Optimizers over the flat master buffer: gated on the device, and stored as plain tensors and JSON.

A gated step changes nothing, counters included. Fused optimizers read torch's `found_inf` flag themselves; others are
undone with a copy. Neither synchronizes with the device. The flag is read on the host in the first step, which creates
the state, and in every step of optimizers with counters on the host, which cannot depend on a device value: Adafactor,
Prodigy, ScheduleFree, and AdamW8bit and RMSprop on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.printable import one_line_of
from lorasmith.training.optim.flat import ParameterGroup
from lorasmith.training.optim.update_rules import build_optimizer, rule_of

_SET_EACH_STEP = ("params", "lr")


class GatedOptimizer:
    """An optimizer whose step takes effect only if a flag on the device is set; arguments as for `build_optimizer`."""

    def __init__(
        self, name: str, groups: Sequence[ParameterGroup], *, weight_decay: float, arguments: str | None = None
    ) -> None:
        self._flats = [group.flat for group in groups]
        self._rates = [group.rate for group in groups]
        optimizer: Any = build_optimizer(name, groups, weight_decay=weight_decay, arguments=arguments)
        self._optimizer = optimizer
        # Schedule-free optimizers have different weights for training and evaluation, switched by train() and eval().
        self._turns = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
        if self._turns:
            optimizer.train()
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._fresh = [_kept(group) for group in optimizer.param_groups]
        self._made = [copy.deepcopy(optimizer.state.get(parameter, {})) for parameter in self._parameters]
        self._reads_flag = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._eager = rule_of(name).eager_on_cpu and self._flats[0].device.type == "cpu"
        self._started = False
        self._waits = True

    @torch.no_grad()
    def step(self, proceed: Tensor, factor: float = 1.0) -> None:
        """Update the buffers if `proceed` (0-d bool on the device) is set, at `factor` times the learning rates."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        if self._waits:
            if proceed:
                self._take_step()
                self._start()
        elif self._reads_flag:
            self._take_step(found_inf=(~proceed).to(torch.float32))
        else:
            before = [tensor.clone() for tensor in (*self._flats, *self._tensors().values())]
            self._take_step()
            for tensor, old in zip((*self._flats, *self._tensors().values()), before, strict=True):
                tensor.copy_(torch.where(proceed, tensor, old))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state besides the buffers: tensors by name, and JSON values. Do not call within `evaluation_weights`.

        The tensors are not copies: the next step modifies them.
        """
        changed = [
            {key: value for key, value in _kept(group).items() if key not in fresh or value != fresh[key]}
            for group, fresh in zip(self._optimizer.param_groups, self._fresh, strict=True)
        ]
        return self._tensors(), {"started": self._started, "parameters": self._numbers(), "groups": changed}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restore what `state` returned, without the buffers, and zero gradients. Raises TrainingError."""
        self._reset()
        if not numbers["started"]:
            return
        self._make_state()
        self._restore(tensors, numbers)
        try:
            self._make_state()  # a trial step: a forged number fails here, and not in the run
        except Exception as error:  # optimizers raise any kind
            raise TrainingError(
                f"the stored numbers of the optimizer must let it take a step, but it fails ({one_line_of(error)}); "
                "start fresh"
            ) from error
        self._restore(tensors, numbers)
        self._start()

    def _restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        if self._tensors().keys() != tensors.keys() or self._numbers().keys() != numbers["parameters"].keys():
            raise TrainingError(
                "the stored state of the optimizer must be of the same optimizer and layers, but has other tensors; "
                "continue with the settings that it was saved with, or start fresh"
            )
        own = self._tensors()
        for name, stored in tensors.items():
            check_alike(stored, own[name])
            state, key, is_whole = self._place(name)
            if is_whole:
                state[key] = stored.to(own[name].device, copy=True)
            else:  # a component of a tensor subclass, such as the codes of a quantized one
                own[name].copy_(stored)
        for name, number in numbers["parameters"].items():
            state, key, _ = self._place(name)
            state[key] = number
        self._set_groups(numbers["groups"])

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Inside the context, buffers hold the weights to evaluate and save: averages, for schedule-free optimizers."""
        if not self._turns:
            yield
            return
        before = [flat.clone() for flat in self._flats]
        self._optimizer.eval()
        try:
            yield
        finally:
            self._optimizer.train()
            for flat, old in zip(self._flats, before, strict=True):  # switching back does not restore the last bits
                flat.copy_(old)

    def _take_step(self, found_inf: Tensor | None = None) -> None:
        if self._reads_flag:
            self._optimizer.found_inf, self._optimizer.grad_scale = found_inf, None
        with torch.compiler.set_stance("force_eager") if self._eager else contextlib.nullcontext():
            self._optimizer.step()

    def _start(self) -> None:
        """Record, after the first step, whether some state is on the host."""
        if self._started:
            return
        self._started = True
        elsewhere = any(tensor.device != self._flats[0].device for tensor in self._tensors().values())
        counts = any(isinstance(number, int | float) for number in self._numbers().values())
        self._waits = elsewhere or counts or any(self.state()[1]["groups"])

    def _reset(self) -> None:
        self._started, self._waits = False, True
        self._optimizer.state.clear()
        for parameter, made in zip(self._parameters, self._made, strict=True):
            if made:
                self._optimizer.state[parameter] = copy.deepcopy(made)
        self._set_groups([{}] * len(self._fresh))

    def _make_state(self) -> None:
        before = [flat.clone() for flat in self._flats]
        for flat in self._flats:
            if flat.grad is not None:
                flat.grad.zero_()
        self._take_step()
        for flat, old in zip(self._flats, before, strict=True):
            flat.copy_(old)

    def _tensors(self) -> dict[str, Tensor]:
        """Tensors of the state by name in a fixed order, tensor subclasses as their components."""
        return {
            name: plain
            for index, parameter in enumerate(self._parameters)
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
            for name, plain in _plain(f"{index}.{key}", value)
        }

    def _numbers(self) -> dict[str, Any]:
        return {
            f"{index}.{key}": value
            for index, parameter in enumerate(self._parameters)
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if not isinstance(value, Tensor)
        }

    def _place(self, name: str) -> tuple[dict[str, Any], str, bool]:
        """A parameter's state, the key in it, and whether the name is that of the whole value or of a component."""
        index, key, *parts = name.split(".")
        return self._optimizer.state[self._parameters[int(index)]], key, not parts

    def _set_groups(self, changed: Sequence[Mapping[str, Any]]) -> None:
        for group, fresh, values in zip(self._optimizer.param_groups, self._fresh, map(_kept, changed), strict=True):
            ours = {key: group[key] for key in _SET_EACH_STEP}
            group.clear()
            group.update({**ours, **fresh, **values})


def check_alike(stored: Tensor, own: Tensor) -> None:
    """Raise TrainingError if a stored tensor differs in shape or dtype from the one that it is to restore."""
    if (stored.shape, stored.dtype) != (own.shape, own.dtype):
        raise TrainingError(
            f"a stored tensor must have shape {tuple(own.shape)} in {own.dtype}, got {tuple(stored.shape)} in "
            f"{stored.dtype}; continue with the settings that it was saved with, or start fresh"
        )


@torch.no_grad()
def check_optimizer(
    name: str,
    *,
    weight_decay: float,
    arguments: str | None = None,
    rates: Collection[float] = (1e-3,),
    device: torch.device | None = None,
) -> None:
    """Raise OptionError unless an optimizer works on a small matrix of `device`, and resumes exactly from its state."""
    device = device or torch.device("cpu")
    first, second = ([_small_group(rate, device) for rate in rates] for _ in range(2))
    optimizer = GatedOptimizer(name, first, weight_decay=weight_decay, arguments=arguments)
    other = GatedOptimizer(name, second, weight_decay=weight_decay, arguments=arguments)
    try:
        _trial_steps(optimizer, first, range(3))  # not the two that `load` takes, so that hidden counters differ
        tensors, numbers = optimizer.state()
        for group, same in zip(first, second, strict=True):
            same.flat.copy_(group.flat)
        other.load(tensors, json.loads(json.dumps(numbers)))
        _trial_steps(optimizer, first, range(3, 5))
        _trial_steps(other, second, range(3, 5))
    except Exception as error:
        remedy = "give all layers one learning rate or choose another optimizer" if len(rates) > 1 else "choose another"
        raise OptionError(
            f"optimizer {name} cannot be used with these settings: {one_line_of(error)}; {remedy}"
        ) from error
    if not all(torch.equal(group.flat, same.flat) for group, same in zip(first, second, strict=True)):
        raise OptionError(
            f"optimizer must continue exactly from its saved state, but {name} keeps state that its state_dict lacks; "
            "choose another one"
        )


def _small_group(rate: float, device: torch.device) -> ParameterGroup:
    # 8-bit optimizers keep an fp32 state below 4096 elements, which would not test them.
    flat = torch.linspace(-1, 1, 4096, device=device)
    flat.grad = torch.zeros_like(flat)
    view = flat.view(64, 64)
    view.grad = flat.grad.view(64, 64)
    return ParameterGroup(flat, (view,), rate)


def _trial_steps(optimizer: GatedOptimizer, groups: Sequence[ParameterGroup], steps: range) -> None:
    for step in steps:
        for group in groups:
            assert group.flat.grad is not None
            group.flat.grad.copy_(torch.sin(group.flat * 7 + step))
        optimizer.step(torch.tensor(True, device=groups[0].flat.device))


def _kept(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _SET_EACH_STEP}


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the components of a tensor subclass."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740), on the device; 1 if not enabled."""

    _FIRST = 2.0**13
    _GROWTH_STEPS = 500

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), self._FIRST if enabled else 1.0, device=device)
        self._calm = torch.zeros((), device=device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"loss_scale": self.scale, "calm_steps": self._calm}

    def update(self, finite: Tensor) -> None:
        """Halve the scale after an overflow; double it after 500 steps without one."""
        if not self.enabled:
            return
        calm = torch.where(finite, self._calm + 1, torch.zeros_like(self._calm))
        grow = calm >= self._GROWTH_STEPS
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale.copy_((self.scale * factor).clamp(1.0, 2.0**24))
        self._calm.copy_(torch.where(grow, torch.zeros_like(calm), calm))
