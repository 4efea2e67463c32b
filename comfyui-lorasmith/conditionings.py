"""Conditionings as ComfyUI made them: the arguments of a MODEL's network for one image, and for a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.families.conditionings import Conditioning

from .controls import Control

_REFUSED = {
    "gligen": "GLIGEN",
    "hooks": "hooks",
    "area": "an area",
    "mask": "a mask",
}
"""Keys of a conditioning's options that training does not follow, in words."""


@dataclass(frozen=True, repr=False)
class ComfyConditioning(Conditioning):
    """What a network gets of one image, or of a batch: its COND objects as tensors, and how to make arguments of them.

    Attributes:
        conds: ComfyUI's COND objects of one image, by argument; empty for a batch.
        lists: number of tensors of arguments that are lists; they are `argument.0` and so on in `tensors`.
        constants: arguments that a batch has once; `control` is a `Control`, whose image has a batch of its own.
        others: conditionings of the image with further texts, by text.
    """

    conds: Mapping[str, Any] = field(default_factory=dict)
    lists: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, ComfyConditioning] = field(default_factory=dict)

    def with_text(self, other: Conditioning) -> ComfyConditioning:
        return self.others[other.text or ""]

    def conds_of_batch(self) -> tuple[dict[str, Any], Control | None]:
        """COND objects of a batch by argument, as samplers take them, and its control."""
        kinds = comfy.conds
        arguments = self.arguments()
        control = arguments.pop("control", None)
        conds: dict[str, Any] = {}
        for name, value in arguments.items():
            if name in self.constants:
                conds[name] = kinds.CONDConstant(value)
            else:
                conds[name] = (kinds.CONDList if name in self.lists else kinds.CONDRegular)(value)
        return conds, control

    def arguments(self) -> dict[str, Any]:
        """Arguments of `apply_model`."""
        found = {name: [self.tensors[f"{name}.{index}"] for index in range(n)] for name, n in self.lists.items()}
        parts = {f"{name}.{index}" for name, n in self.lists.items() for index in range(n)}
        plain = {name: tensor for name, tensor in self.tensors.items() if name not in parts and "#" not in name}
        return {**plain, **found, **self.constants}


class ConditioningMaker:
    """Makes `ComfyConditioning`s of COND objects.

    A batch shares the arguments that it has once, so different ones get different names; `alone` it is one's own batch.
    """

    def __init__(self) -> None:
        self._constants: dict[str, list[Any]] = {}
        self._count = 0

    def __call__(
        self, conds: Mapping[str, Any], control: Control | None = None, *, alone: bool = False
    ) -> ComfyConditioning:
        tensors: dict[str, Tensor] = {}
        lists: dict[str, int] = {}
        constants: dict[str, Any] = {}
        for name, cond in conds.items():
            value = cond.cond
            if _is_one(value):
                tensors[name] = value
            elif isinstance(value, list | tuple) and value and all(map(_is_one, value)):
                lists[name] = len(value)
                tensors |= {f"{name}.{index}": part for index, part in enumerate(value)}
            else:
                constants[name] = value
                tensors[f"{name}#{self._number(name, cond)}"] = torch.empty(1, 0)
        if control is not None:
            constants["control"] = control
        if control is not None or alone:
            self._count += 1
            tensors[f"control#{self._count} {'' if control is None else control.digest}"] = torch.empty(1, 0)
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return ComfyConditioning(tensors, conds=_without_gradient(conds), lists=lists, constants=constants)

    def _number(self, name: str, cond: Any) -> int:
        known = self._constants.setdefault(name, [])
        same = (number for number, other in enumerate(known) if type(other) is type(cond) and _equal(other, cond))
        number = next(same, len(known))
        if number == len(known):
            known.append(cond)
        return number


def joined(conditionings: Sequence[ComfyConditioning]) -> ComfyConditioning:
    """One batch of images whose conditionings have tensors of the same shapes, joined as ComfyUI joins them."""
    first = conditionings[0]
    tensors: dict[str, Tensor] = {}
    for name, cond in first.conds.items():
        if name in first.constants:
            continue
        value = cond.concat([one.conds[name] for one in conditionings[1:]])
        if name in first.lists:
            tensors |= {f"{name}.{index}": part for index, part in enumerate(value)}
        else:
            tensors[name] = value
    return ComfyConditioning(tensors, lists=first.lists, constants=first.constants)


def options_of(conditioning: Sequence[Any], name: str) -> dict[str, Any]:
    """The options of one entry of a CONDITIONING, as ComfyUI's samplers pass them on. Raises DataError."""
    context, given = conditioning
    found = [words for key, words in _REFUSED.items() if given.get(key) is not None]
    if (control := given.get("control")) is not None and control.get_extra_hooks():
        found.append("a ControlNet with hooks")
    if found:
        raise DataError(
            f"conditionings to train on must be captions alone, but that of {name} has {' and '.join(found)}; leave "
            "out the nodes that add it"
        )
    options = dict(given)
    options["model_conds"] = dict(given.get("model_conds", {}))
    if context is not None:
        options["cross_attn"] = context
    return options


def _is_one(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one.cond, Tensor) or isinstance(other.cond, Tensor):
        return isinstance(one.cond, Tensor) and isinstance(other.cond, Tensor) and torch.equal(one.cond, other.cond)
    return bool(comfy.conds.CONDConstant(one.cond).can_concat(comfy.conds.CONDConstant(other.cond)))


def _without_gradient(conds: Mapping[str, Any]) -> dict[str, Any]:
    """COND objects with their tensors on the CPU."""
    found = {}
    for name, cond in conds.items():
        value = cond.cond
        if isinstance(value, Tensor):
            cond = type(cond)(value.detach().to("cpu", copy=True))
        elif isinstance(value, list) and all(isinstance(part, Tensor) for part in value):
            cond = type(cond)([part.detach().to("cpu", copy=True) for part in value])
        found[name] = cond
    return found
