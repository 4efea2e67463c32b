"""Copy on write: tensors that keep their values while a network changes memory in place.

Autograd refuses to differentiate through a saved tensor that was changed since; what recomputes a result from such a
tensor would compute another one. Inside of `changes_watched`, what `KeptValues.keep` was given is copied before a
function of torch changes its memory: `x.add_(y)`, `x += y`, `x[0] = y`, `torch.add(x, y, out=z)`,
`F.silu(x, inplace=True)`, `torch.ops.aten.add_(x, y)`. Only what is kept and changed is copied, and numbers are those
of the same network.

Functions are found by the rule by which torch names them, and replaced while `changes_intercepted`; a mode of torch's
(`TorchFunctionMode`) would take a microsecond and a half in each other function as well.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only


class Kept:
    """A tensor with the value that it has now; it moves to other memory before its own is changed."""

    __slots__ = ("__weakref__", "_version", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.move(tensor)

    def move(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, tensor._version

    @property
    def value(self) -> Tensor:
        # The check that autograd makes for its own saved tensors.
        assert self.tensor._version == self._version, "modified in place since, unwatched"
        return self.tensor


class KeptValues:
    """What a forward pass and its backward pass need again."""

    def __init__(self) -> None:
        self._of: dict[int, list[weakref.ref[Kept]]] = {}  # by the memory that tensors are in
        self._new: list[weakref.ref[Kept]] = []  # which are not in it yet
        self.before_changes: list[Callable[[int], None]] = []  # called with that, such as by who copies it meanwhile

    def keep(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        self._new.append(weakref.ref(kept))
        return kept

    def before_change(self, tensor: Tensor) -> None:
        """Copy what is kept of the memory of a tensor."""
        if (key := storage_key(tensor)) is None:
            return
        new, self._new = self._new, []
        for reference in new:
            if (kept := reference()) is not None and (place := storage_key(kept.tensor)) is not None:
                self._of.setdefault(place, []).append(reference)
        for call in self.before_changes:
            call(key)
        alive = [kept for reference in self._of.pop(key, ()) if (kept := reference()) is not None]
        if not alive:
            return
        with torch.no_grad():
            for moved in _copies(alive):
                self._new.append(weakref.ref(moved))  # the second run of a recomputed block may change the copy


def value_of(kept: Kept) -> Tensor:
    """The value, as a function that unpacks saved tensors."""
    return kept.value


def storage_key(tensor: Tensor) -> int | None:
    """What tensors in the same memory have in common while it is in use; None for tensors without memory."""
    try:
        address: int = tensor.untyped_storage()._cdata
    except RuntimeError:  # sparse ones, and those that wrap others
        return None
    return address


def _copies(kept: Sequence[Kept]) -> Iterator[Kept]:
    """Move tensors of one storage to a copy: of the storage, so that they share it, or of one tensor alone."""
    whole: dict[torch.dtype, Tensor] = {}
    size = kept[0].tensor.untyped_storage().nbytes()
    is_alone = len(kept) == 1 and kept[0].tensor.nbytes <= size
    for copy in kept:
        tensor = copy.value
        if is_alone or size % tensor.itemsize:
            copy.move(tensor.clone())
        else:
            if tensor.dtype not in whole:
                whole[tensor.dtype] = tensor.as_strided((size // tensor.itemsize,), (1,), 0).clone()
            copy.move(whole[tensor.dtype].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
        yield copy


class _Active(threading.local):
    """What the pass of a thread keeps; backward passes have threads of their own."""

    values: KeptValues | None = None


_active = _Active()


def active_values() -> KeptValues | None:
    """The values that this thread copies before they change."""
    return _active.values


@contextlib.contextmanager
def changes_watched(values: KeptValues | None) -> Iterator[None]:
    """Inside the context, `values` are copied before this thread changes them in place; with None it does nothing."""
    if values is None:
        yield
        return
    before, _active.values = _active.values, values
    try:
        with changes_intercepted():
            yield
    finally:
        _active.values = before


@contextlib.contextmanager
def changes_allowed() -> Iterator[None]:
    """Inside the context, a forward pass may change what its backward pass needs, which may be run inside, too."""
    values = KeptValues()
    with changes_watched(values), saved_tensors_hooks(values.keep, value_of):
        yield


class _Interception:
    """How many contexts need the functions replaced, and what undoes that."""

    def __init__(self) -> None:
        self.lock, self.count, self.undo = threading.Lock(), 0, contextlib.ExitStack()


_interception = _Interception()


@contextlib.contextmanager
def changes_intercepted() -> Iterator[None]:
    """Inside the context, `changes_watched` costs nothing to enter; it replaces functions of torch, for all threads."""
    interception = _interception
    with interception.lock:
        interception.count += 1
        if interception.count == 1:
            for place, name, function in _replacements():
                undo = functools.partial(setattr, place, name, vars(place)[name]) if name in vars(place) else None
                interception.undo.callback(undo or functools.partial(delattr, place, name))
                setattr(place, name, function)
    try:
        yield
    finally:
        with interception.lock:
            interception.count -= 1
            if not interception.count:
                interception.undo.close()


@functools.cache
def _replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    ops = [(kind, "__call__", _ops_reported(kind.__call__)) for kind in (OpOverload, OpOverloadPacket)]
    return [*((place, name, _reported(function, name)) for place, name, function in _changing_functions()), *ops]


def _changing_functions() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Places, names and functions that change an argument: always the first, or one that is given as `out`."""
    for name in dir(Tensor):
        is_statement = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")  # such as __iadd__
        if is_statement or name == "__setitem__" or (name.endswith("_") and not name.startswith("_")):
            yield Tensor, name, getattr(Tensor, name)
    for place in (torch, torch._C._nn, torch._VF, torch.special, torch.linalg, F):
        for name in dir(getattr(place, "vf", place)):  # of `torch._VF`, which looks functions up
            function = getattr(place, name)
            if isinstance(function, types.BuiltinFunctionType) and (
                (name.endswith("_") and not name.startswith("__")) or "out=" in (function.__doc__ or "")
            ):
                yield place, name, function


_FIRST: frozenset[int | str] = frozenset((0, "input", "self"))
"""The first argument of a function."""


def _reported(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    takes_out = not name.endswith("_")

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        values = _active.values
        if values is None or (takes_out and kwargs.get("out") is None):
            return function(*args, **kwargs)
        if takes_out:
            return _into(kwargs["out"], values, function, args, kwargs)
        return _changing(values, function, args, kwargs, _FIRST)

    return called


def _ops_reported(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of an operator of `torch.ops`, whose schema has what it changes."""

    @functools.wraps(call)
    def called(op: Any, /, *args: Any, **kwargs: Any) -> Any:
        values = _active.values
        if values is None or not (changed := _changed_by(op)):
            return call(op, *args, **kwargs)
        return _changing(values, functools.partial(call, op), args, kwargs, changed)

    return called


@functools.cache
def _changed_by(op: OpOverload | OpOverloadPacket) -> frozenset[int | str]:
    """Positions and names of arguments that an operator changes, or one of its overloads."""
    overloads = [op] if isinstance(op, OpOverload) else [getattr(op, name) for name in op.overloads()]
    return frozenset(
        key
        for overload in overloads
        for position, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for key in ((argument.name,) if argument.kwarg_only else (position, argument.name))
    )


def _changing(values: KeptValues, function: Any, args: Any, kwargs: Any, places: frozenset[int | str]) -> Any:
    """A call of a function that changes the tensors at `places`, positions and names of its arguments."""
    changed: list[Tensor] = []
    for place, argument in (*enumerate(args), *kwargs.items()):
        if place in places:
            changed += [leaf for leaf in _leaves(argument) if isinstance(leaf, Tensor)]
    if not changed:
        return function(*args, **kwargs)
    for tensor in changed:
        values.before_change(tensor)
    if torch.is_grad_enabled():
        # Autograd saves other arguments before the change, so those in the same memory are given as copies.
        keys = {storage_key(tensor) for tensor in changed}
        args = [argument if place in places else _apart(argument, keys) for place, argument in enumerate(args)]
        kwargs = {name: argument if name in places else _apart(argument, keys) for name, argument in kwargs.items()}
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        # A statement may give its variable another tensor; of a part of a tensor, that tensor is meant.
        name = getattr(function, "__name__", "")
        is_statement = name.startswith("__i") and "is a view and is being modified inplace" in str(error)
        if not is_statement or _is_part(args[0]):
            raise
        return getattr(Tensor, f"__{name[3:]}")(*args).to(args[0].dtype)


def _leaves(value: Any) -> Sequence[Any]:
    return (value,) if isinstance(value, Tensor) else tree_leaves(value)


def _apart(value: Any, keys: set[int | None]) -> Any:
    """An argument without memory of others."""
    if isinstance(value, Tensor):
        return value.clone() if storage_key(value) in keys else value
    if isinstance(value, list | tuple | dict):
        return tree_map_only(Tensor, functools.partial(_apart, keys=keys), value)
    return value


def _into(out: Any, values: KeptValues, function: Any, args: Any, kwargs: Any) -> Any:
    """A call with `out`, which torch does not differentiate."""
    for into in tree_leaves(out):
        values.before_change(into)
    leafs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in leafs):
        return function(*args, **kwargs)
    result = function(*args, **{name: value for name, value in kwargs.items() if name != "out"})
    for into, source in zip(tree_leaves(out), tree_leaves(result), strict=True):
        into.copy_(source)
    return out


def _is_part(tensor: Tensor) -> bool:
    return tensor._base is not None and tensor._base.numel() != tensor.numel()
