"""What a forward pass keeps for the backward pass, and how it can be less.

    keep        what autograd asks for, but no input of a frozen convolution, whose gradient needs the weight alone
    lean        besides, results that are cheap to have again (norms, activation functions, products with a scale,
                joined tensors) are made again from what is kept anyway
    selective   besides, outputs of Linear layers that widen their input fourfold or more, as feed-forward layers do
    host        as `keep`, but large tensors wait in host memory

`lean` and `selective` are checkpointing (Chen et al. 2016, arXiv:1604.06174) of single results instead of blocks:
attention and all other products are kept, nothing is made again that the backward pass does not ask for, and every
number stays the same to the bit. They know functions and layers, not models, so they work on any.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lorasmith.adapters.frozen_layer import CONVOLUTIONS, FrozenLayer, FrozenProduct
from lorasmith.adapters.inject import restore_forward
from lorasmith.adapters.packed_layers import packable_layers
from lorasmith.core.choices import ActivationPlan
from lorasmith.training.memory.host_memory import HostMemory

__all__ = ["Notes", "Remade", "economical", "held_by", "noted", "sparing"]

_SMALL = 1 << 16
"""Bytes below which a tensor is not worth the trouble of making it again."""

_REMADE = "_lorasmith_remade"

_FUNCTIONS = frozenset({"silu", "gelu", "relu", "mish", "group_norm", "layer_norm", "rms_norm"})
_ARITHMETIC = frozenset({"mul", "__mul__", "__rmul__", "add", "__add__", "__radd__", "cat"})
_VIEWS = frozenset({"view", "reshape", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze"})
_CASTS = frozenset({"to", "float", "type_as"})
_PARTS = frozenset({"chunk", "split", "unbind"})
_CHEAP = _FUNCTIONS | _ARITHMETIC | _VIEWS | _CASTS | _PARTS
"""Names of torch's functions whose results are made again; none of them changes its arguments."""


@contextlib.contextmanager
def sparing(module: nn.Module, kind: ActivationPlan) -> Iterator[None]:
    """The layers of `module` as `kind` wants them while inside, adapters attached or not."""
    with contextlib.ExitStack() as undo:
        for layer in packable_layers(module):
            own = layer.__dict__.get("forward")
            forward: Callable[[Tensor], Tensor] | None = None
            if isinstance(layer, CONVOLUTIONS) and own is None:
                forward = FrozenProduct(FrozenLayer(layer), with_bias=True).__call__
            elif kind == "selective" and isinstance(layer, nn.Linear) and layer.out_features >= 4 * layer.in_features:
                forward = functools.partial(_made_again, layer.forward)
            if forward is not None:
                undo.callback(restore_forward, layer, own)
                setattr(layer, "forward", forward)  # noqa: B010 - to a type checker it is a method
        yield


@contextlib.contextmanager
def economical(kind: ActivationPlan, module: nn.Module) -> Iterator[None]:
    """Run a forward pass of `module` inside. The backward pass comes later."""
    assert kind != "auto", "activations auto has to be decided before a step"
    if kind == "keep" or not torch.is_grad_enabled():
        yield
        return
    hooks = torch.autograd.graph.saved_tensors_hooks
    if kind == "host":
        away = HostMemory(module)
        with hooks(away.pack, away.unpack):
            yield
        return
    with noted() as notes, hooks(notes.pack, notes.unpack):
        yield


@contextlib.contextmanager
def noted() -> Iterator[Notes]:
    """How cheap results of a forward pass inside are made, for `Notes.pack` to know."""
    notes = Notes()
    before, Notes.active = Notes.active, notes
    try:
        with _Noting(notes):
            yield notes
    finally:
        Notes.active = before


def held_by(packed: Tensor | Remade) -> Iterator[Tensor]:
    """The tensors that stay in memory for one that was packed."""
    if isinstance(packed, Tensor):
        yield packed
        return
    for one in packed.leaves:
        if isinstance(one, Tensor | Remade):
            yield from held_by(one)


class Remade:
    """How to make a tensor again: a function and its arguments, of which tensors may be recipes themselves.

    It is followed once; what it makes stays until everybody who asked for it has it.

    Attributes:
        leaves: the arguments, nested ones and keywords too.
    """

    __slots__ = ("_function", "_spec", "_uses", "_value", "_versions", "leaves")

    def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: Any) -> None:
        self._function = function
        self.leaves = leaves
        self._spec = spec
        self._versions = [one._version if isinstance(one, Tensor) else 0 for one in leaves]
        self._uses = 0
        self._value: Tensor | None = None

    def ask(self) -> None:
        """One more will want it."""
        if not self._uses:
            for one in self.leaves:
                if isinstance(one, Remade):
                    one.ask()
        self._uses += 1

    def take(self) -> Tensor:
        """The tensor, made anew unless somebody has just had it made."""
        value = self._made() if self._value is None else self._value
        self._uses -= 1
        self._value = value if self._uses > 0 else None
        return value

    def _made(self) -> Tensor:
        values = []
        for one, version in zip(self.leaves, self._versions, strict=True):
            # What autograd checks of tensors that it keeps itself.
            assert not isinstance(one, Tensor) or one._version == version, f"{self._function}: changed in place since"
            values.append(one.take() if isinstance(one, Remade) else one)
        args, kwargs = tree_unflatten(values, self._spec)
        result: Tensor = self._function(*args, **kwargs)
        return result


class Notes:
    """What a forward pass keeps: tensors as they are, or recipes.

    Attributes:
        active: the notes of the forward pass that is running.
    """

    active: ClassVar[Notes | None] = None

    def __init__(self) -> None:
        self._kept: set[int] = set()

    def write(self, result: Tensor, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Note how `result` was made, if making it again costs less memory than keeping it."""
        if result.nbytes < _SMALL or any(result is one for one in args):
            return
        leaves, spec = tree_flatten((args, kwargs))
        held = 0
        for index, one in enumerate(leaves):
            if not isinstance(one, Tensor):
                continue
            recipe = _remade_of(one)
            if recipe is not None:
                leaves[index] = recipe
            elif _storage(one) == _storage(result):
                return  # a view of something that has no recipe
            elif one.nbytes >= _SMALL and _storage(one) not in self._kept:
                held += one.untyped_storage().nbytes()
        if 2 * held <= result.nbytes:
            setattr(result, _REMADE, (result._version, Remade(function, leaves, spec)))

    def pack(self, tensor: Tensor) -> Tensor | Remade:
        """What stands for a tensor until the backward pass."""
        recipe = _remade_of(tensor)
        if recipe is None:
            self._kept.add(_storage(tensor))
            return tensor
        recipe.ask()
        return recipe

    def unpack(self, packed: Tensor | Remade) -> Tensor:
        """The tensor."""
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return packed.take()


class _Noting(TorchFunctionMode):
    """Writes down how results of cheap functions are made."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _CHEAP:
            if type(result) is Tensor:
                if result.requires_grad:
                    self._notes.write(result, func, args, kwargs or {})
            elif name in _PARTS:
                for index, part in enumerate(result):
                    if part.requires_grad:
                        self._notes.write(part, functools.partial(_part, func, index), args, kwargs or {})
        return result


def _made_again(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = forward(x)
    if Notes.active is not None and y.requires_grad:
        Notes.active.write(y, forward, (x,), {})
    return y


def _part(func: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Tensor:
    part: Tensor = func(*args, **kwargs)[index]
    return part


def _remade_of(tensor: Tensor) -> Remade | None:
    """How to make a tensor again, if that was noted and it is as it was made."""
    noted = tensor.__dict__.get(_REMADE)
    return noted[1] if noted is not None and noted[0] == tensor._version else None


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
