"""Plans for the activations that a forward pass keeps for the backward pass.

    keep        what autograd saves, except inputs of frozen convolutions, whose gradient needs only the weight
    lean        also, cheap results (norms, activation functions, products with a scale, concatenations) are recomputed
                from tensors that are kept anyway
    selective   also, outputs of Linear layers that widen their input fourfold or more, as in feed-forward networks
    host        as `keep`, but large tensors are offloaded to host memory

`lean` and `selective` are activation checkpointing (Chen et al. 2016, arXiv:1604.06174) of single results instead of
blocks: attention and other products are kept, and all numbers are bit-identical.
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

from lorasmith.adapters.frozen_layer import CONVOLUTIONS, FrozenLayer, FrozenProduct, packable_layers
from lorasmith.adapters.inject import restore_forward
from lorasmith.core.choices import ActivationPlan
from lorasmith.training.memory.host_memory import HostMemory

_SMALL = 1 << 16
"""Size in bytes below which a tensor is kept."""

_RECIPE = "_lorasmith_recipe"

_FUNCTIONS = frozenset({"silu", "gelu", "relu", "mish", "group_norm", "layer_norm", "rms_norm"})
_ARITHMETIC = frozenset({"mul", "__mul__", "__rmul__", "add", "__add__", "__radd__", "cat"})
_VIEWS = frozenset({"view", "reshape", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze"})
_CASTS = frozenset({"to", "float", "type_as"})
_PARTS = frozenset({"chunk", "split", "unbind"})
_CHEAP = _FUNCTIONS | _ARITHMETIC | _VIEWS | _CASTS | _PARTS
"""Names of torch functions whose results are recomputed; none of them modifies its arguments."""


@contextlib.contextmanager
def activations_reduced(module: nn.Module, kind: ActivationPlan) -> Iterator[None]:
    """Inside the context, layers of `module` save no more than `kind` needs, with adapters attached or not."""
    with contextlib.ExitStack() as undo:
        for layer in packable_layers(module):
            own = layer.__dict__.get("forward")
            forward: Callable[[Tensor], Tensor] | None = None
            if isinstance(layer, CONVOLUTIONS) and own is None:
                forward = FrozenProduct(FrozenLayer(layer), with_bias=True).__call__
            elif kind == "selective" and isinstance(layer, nn.Linear) and layer.out_features >= 4 * layer.in_features:
                forward = functools.partial(_recorded_forward, layer.forward)
            if forward is not None:
                undo.callback(restore_forward, layer, own)
                setattr(layer, "forward", forward)  # noqa: B010 - to a type checker it is a method
        yield


@contextlib.contextmanager
def activations_packed(kind: ActivationPlan, module: nn.Module) -> Iterator[None]:
    """Inside the context, forward passes of `module` save activations by `kind`; run the backward pass later."""
    assert kind != "auto", "activations auto is resolved before the first step"
    if kind == "keep" or not torch.is_grad_enabled():
        yield
        return
    hooks = torch.autograd.graph.saved_tensors_hooks
    if kind == "host":
        away = HostMemory(module)
        with hooks(away.pack, away.unpack):
            yield
        return
    with recipes_recorded() as recipes, hooks(recipes.pack, recipes.unpack):
        yield


@contextlib.contextmanager
def recipes_recorded() -> Iterator[Recipes]:
    """Inside the context, a forward pass records recipes of its cheap results, for `Recipes.pack`."""
    recipes = Recipes()
    before, Recipes.active = Recipes.active, recipes
    try:
        with _Recorder(recipes):
            yield recipes
    finally:
        Recipes.active = before


def held_by(packed: Tensor | Recipe) -> Iterator[Tensor]:
    """The tensors that a packed tensor keeps in memory."""
    if isinstance(packed, Tensor):
        yield packed
        return
    for one in packed.leaves:
        if isinstance(one, Tensor | Recipe):
            yield from held_by(one)


class Recipe:
    """How to recompute a tensor: a function and its arguments, whose tensors may be recipes themselves.

    The function is called once; its result is kept until every `reserve` is matched by a `take`.
    """

    __slots__ = ("_function", "_spec", "_uses", "_value", "_versions", "leaves")

    def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: Any) -> None:
        self._function = function
        self.leaves = leaves  # nested arguments and keywords included
        self._spec = spec
        self._versions = [one._version if isinstance(one, Tensor) else 0 for one in leaves]
        self._uses = 0
        self._value: Tensor | None = None

    def reserve(self) -> None:
        """Announce one more `take`."""
        if not self._uses:
            for one in self.leaves:
                if isinstance(one, Recipe):
                    one.reserve()
        self._uses += 1

    def take(self) -> Tensor:
        value = self._recomputed() if self._value is None else self._value
        self._uses -= 1
        self._value = value if self._uses > 0 else None
        return value

    def _recomputed(self) -> Tensor:
        values = []
        for one, version in zip(self.leaves, self._versions, strict=True):
            # The check that autograd makes for its own saved tensors.
            assert not isinstance(one, Tensor) or one._version == version, f"{self._function}: modified in place since"
            values.append(one.take() if isinstance(one, Recipe) else one)
        args, kwargs = tree_unflatten(values, self._spec)
        result: Tensor = self._function(*args, **kwargs)
        return result


class Recipes:
    """The saved tensors of a forward pass: unchanged, or replaced by recipes."""

    active: ClassVar[Recipes | None] = None  # of the current forward pass

    def __init__(self) -> None:
        self._kept: set[int] = set()

    def write(self, result: Tensor, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Record `function` as the recipe of `result`, if its arguments need less memory than the result."""
        if result.nbytes < _SMALL or any(result is one for one in args):
            return
        leaves, spec = tree_flatten((args, kwargs))
        held = 0
        for index, one in enumerate(leaves):
            if not isinstance(one, Tensor):
                continue
            recipe = _recipe_of(one)
            if recipe is not None:
                leaves[index] = recipe
            elif _storage(one) == _storage(result):
                return  # a view of a tensor without recipe
            elif one.nbytes >= _SMALL and _storage(one) not in self._kept:
                held += one.untyped_storage().nbytes()
        if 2 * held <= result.nbytes:
            setattr(result, _RECIPE, (result._version, Recipe(function, leaves, spec)))

    def pack(self, tensor: Tensor) -> Tensor | Recipe:
        recipe = _recipe_of(tensor)
        if recipe is None:
            self._kept.add(_storage(tensor))
            return tensor
        recipe.reserve()
        return recipe

    def unpack(self, packed: Tensor | Recipe) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return packed.take()


class _Recorder(TorchFunctionMode):
    def __init__(self, recipes: Recipes) -> None:
        super().__init__()
        self._recipes = recipes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _CHEAP:
            if type(result) is Tensor:
                if result.requires_grad:
                    self._recipes.write(result, func, args, kwargs or {})
            elif name in _PARTS:
                for index, part in enumerate(result):
                    if part.requires_grad:
                        self._recipes.write(part, functools.partial(_part, func, index), args, kwargs or {})
        return result


def _recorded_forward(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = forward(x)
    if Recipes.active is not None and y.requires_grad:
        Recipes.active.write(y, forward, (x,), {})
    return y


def _part(func: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Tensor:
    part: Tensor = func(*args, **kwargs)[index]
    return part


def _recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor, unless the tensor was modified since."""
    found = tensor.__dict__.get(_RECIPE)
    return found[1] if found is not None and found[0] == tensor._version else None


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
