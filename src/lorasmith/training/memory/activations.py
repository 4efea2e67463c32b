"""Activations between the forward and the backward pass: kept, recomputed singly or by blocks, or offloaded.

    keep        what autograd saves, except inputs of frozen convolutions, whose gradient needs only the weight
    lean        also, cheap results (norms, activation functions, products with a scale, concatenations) are recomputed
                from tensors that are kept anyway
    selective   also, outputs of Linear layers that widen their input fourfold or more, as in feed-forward networks
    host        as `keep`, but large tensors are offloaded to host memory

`lean` and `selective` are activation checkpointing (Chen et al. 2016, arXiv:1604.06174) of single results instead of
blocks: attention and other products are kept, and all numbers are bit-identical.

The repeated blocks of a model are recomputed by depth. Depth 1 recomputes the outermost ones, which needs least memory.
Each further depth is one nesting level inside, down to the innermost blocks. Recomputation is non-reentrant, so blocks
whose inputs need no gradient are covered too; loss and gradients do not change.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lorasmith.adapters.frozen_layer import CONVOLUTIONS, FrozenLayer, FrozenProduct, packable_layers
from lorasmith.adapters.inject import adapters_on, restore_forward
from lorasmith.core.blocks import blocks_at_depth
from lorasmith.core.choices import ActivationPlan
from lorasmith.core.kept_values import Kept, KeptValues, changes_allowed, changes_watched
from lorasmith.core.placement import side_stream
from lorasmith.core.recomputation import Recomputing, constant_kept, recomputed
from lorasmith.training.memory.backward_passes import norm_forward, rotations_replaced
from lorasmith.training.memory.fused_blocks import blocks_fused

_SMALL = 1 << 16
"""Size in bytes below which a tensor is kept."""

_RECIPE = "_lorasmith_recipe"

_FUNCTIONS = frozenset({"silu", "gelu", "relu", "mish", "group_norm", "layer_norm", "rms_norm", "rotary_embedding"})
_ARITHMETIC = frozenset({"mul", "__mul__", "__rmul__", "add", "__add__", "__radd__", "cat"})
_VIEWS = frozenset({"view", "reshape", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze"})
_CASTS = frozenset({"to", "float", "type_as"})
_PARTS = frozenset({"chunk", "split", "split_with_sizes", "unbind"})
_CHEAP = _FUNCTIONS | _ARITHMETIC | _VIEWS | _CASTS | _PARTS
"""Names of torch functions whose results are recomputed; none of them modifies its arguments."""


@contextlib.contextmanager
def activations_reduced(module: nn.Module, kind: ActivationPlan, *, compiled: bool = False) -> Iterator[None]:
    """Inside the context, layers of `module` save no more than `kind` needs, with adapters attached or not.

    Blocks that will not be `compiled` run in fewer kernels on a GPU.
    """
    norms = [layer for layer in module.modules() if type(layer) is nn.RMSNorm]
    # Recipes are of single operations.
    fused = blocks_fused(module) if kind in ("keep", "host") and not compiled else contextlib.nullcontext()
    with rotations_replaced(), fused, contextlib.ExitStack() as undo:
        for layer in (*packable_layers(module), *norms):
            own = layer.__dict__.get("forward")
            forward: Callable[[Tensor], Tensor] | None = None
            if isinstance(layer, nn.RMSNorm) and own is None:
                forward = types.MethodType(norm_forward, layer)
            elif isinstance(layer, CONVOLUTIONS) and own is None:
                forward = FrozenProduct(FrozenLayer(layer), with_bias=True).__call__
            elif kind == "selective" and isinstance(layer, nn.Linear) and layer.out_features >= 4 * layer.in_features:
                forward = functools.partial(_recorded_forward, layer.forward)
            if forward is not None:
                undo.callback(restore_forward, layer, own)
                setattr(layer, "forward", forward)  # noqa: B010 - to a type checker it is a method
        yield


@contextlib.contextmanager
def activations_packed(kind: ActivationPlan, module: nn.Module, *, watched: bool = False) -> Iterator[None]:
    """Inside the context, forward passes of `module` save activations by `kind`; run the backward pass later.

    If `watched`, or with recipes, the module may change tensors in place that the backward pass needs.
    """
    assert kind != "auto", "activations auto is resolved before the first step"
    if not torch.is_grad_enabled() or (kind == "keep" and not watched):
        yield
        return
    hooks = torch.autograd.graph.saved_tensors_hooks
    if kind == "keep":
        with changes_allowed():
            yield
        return
    if kind == "host":
        away = HostMemory(module, KeptValues() if watched else None)
        with changes_watched(away.values), hooks(away.pack, away.unpack):
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
        with changes_watched(recipes.values), _Recorder(recipes):
            yield recipes
    finally:
        Recipes.active = before


def held_by(packed: Kept | Recipe) -> Iterator[Tensor]:
    """The tensors that a packed tensor keeps in memory."""
    if isinstance(packed, Kept):
        yield packed.tensor
        return
    for leaf in packed.leaves:
        if isinstance(leaf, Kept | Recipe):
            yield from held_by(leaf)


class Recipe:
    """How to recompute a tensor: a function and its arguments, whose tensors are kept, or recipes themselves.

    The function is called once; its result is kept until every `reserve` is matched by a `take`.
    """

    __slots__ = ("_function", "_spec", "_uses", "_value", "leaves")

    def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: Any) -> None:
        self._function = function
        self.leaves = leaves  # nested arguments and keywords included
        self._spec = spec
        self._uses = 0
        self._value: Tensor | None = None

    def reserve(self) -> None:
        """Announce one more `take`."""
        if not self._uses:
            for leaf in self.leaves:
                if isinstance(leaf, Recipe):
                    leaf.reserve()
        self._uses += 1

    def take(self) -> Tensor:
        value = self._recomputed() if self._value is None else self._value
        self._uses -= 1
        self._value = value if self._uses > 0 else None
        return value

    def _recomputed(self) -> Tensor:
        args, kwargs = tree_unflatten([_taken(leaf) for leaf in self.leaves], self._spec)
        result: Tensor = self._function(*args, **kwargs)
        return result


class Recipes:
    """The saved tensors of a forward pass: unchanged, or replaced by recipes."""

    active: ClassVar[Recipes | None] = None  # of the current forward pass

    def __init__(self) -> None:
        self.values = KeptValues()
        self._kept: set[int] = set()

    def write(self, result: Tensor, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Record `function` as the recipe of `result`, if its arguments need less memory than the result."""
        if result.nbytes < _SMALL or any(result is argument for argument in args):
            return
        leaves, spec = tree_flatten((args, kwargs))
        held = 0
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            recipe = _recipe_of(leaf)
            if recipe is not None:
                leaves[index] = recipe
            elif _storage(leaf) == _storage(result):
                return  # a view of a tensor without recipe
            elif leaf.nbytes >= _SMALL and _storage(leaf) not in self._kept:
                held += leaf.untyped_storage().nbytes()
        if 2 * held <= result.nbytes:
            leaves = [self.values.keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            setattr(result, _RECIPE, (result._version, Recipe(function, leaves, spec)))

    def pack(self, tensor: Tensor) -> Kept | Recipe:
        recipe = _recipe_of(tensor)
        if recipe is None:
            self._kept.add(_storage(tensor))
            return self.values.keep(tensor)
        recipe.reserve()
        return recipe

    def unpack(self, packed: Kept | Recipe) -> Tensor:
        with torch.no_grad():
            found: Tensor = _taken(packed)
            return found


class _Recorder(TorchFunctionMode):
    def __init__(self, recipes: Recipes) -> None:
        super().__init__()
        self._recipes = recipes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if _is_cheap(name, args):
            if type(result) is Tensor:
                if result.requires_grad:
                    self._recipes.write(result, func, args, kwargs or {})
            elif name in _PARTS:
                for index, part in enumerate(result):
                    if part.requires_grad:
                        self._recipes.write(part, functools.partial(_part, func, index), args, kwargs or {})
        return result


def _is_cheap(name: str, args: Any) -> bool:
    if name != "__getitem__":
        return name in _CHEAP
    # With a mask for an index the backward pass would wait for the device.
    return not any(isinstance(leave, Tensor) for leave in tree_leaves(args[1]))


def _recorded_forward(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = forward(x)
    if Recipes.active is not None and y.requires_grad:
        Recipes.active.write(y, forward, (x,), {})
    return y


def _taken(leaf: Any) -> Any:
    """What a leaf of a recipe stands for."""
    if isinstance(leaf, Recipe):
        return leaf.take()
    return leaf.value if isinstance(leaf, Kept) else leaf


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


@contextlib.contextmanager
def blocks_checkpointed(model: nn.Module, depth: int, *, kept: int = 1, compiled: bool = False) -> Iterator[None]:
    """Inside the context, blocks at `depth` but the last `kept` are recomputed in the backward pass, at depth 0 none.

    Blocks that will be `compiled` share code, so all of them are recomputed, and whole.
    """
    recomputing = Recomputing(kept)
    with contextlib.ExitStack() as undo:

        def replace(module: nn.Module, forward: Callable[..., Any]) -> None:
            undo.callback(restore_forward, module, module.__dict__.get("forward"))
            setattr(module, "forward", forward)  # noqa: B010 - to a type checker it is a method

        for block in blocks_at_depth(model, depth) if depth else []:
            if compiled:
                replace(block, types.MethodType(recomputed, block.forward))
                continue
            replace(block, functools.partial(recomputing.run, block.forward))
            for layer in block.modules():  # such as those that make scales of the time
                if isinstance(layer, nn.Linear | nn.SiLU) and not adapters_on(layer):
                    replace(layer, functools.partial(constant_kept, layer.forward))
        yield


def without_recomputing(forward: Callable[..., Any]) -> tuple[Callable[..., Any], bool]:
    """The forward of a block that will be compiled before `blocks_checkpointed`, and whether that changed it."""
    if isinstance(forward, types.MethodType) and forward.__func__ is recomputed:
        inner: Any = forward.__self__
        return inner, True
    return forward, False


_WORTH_MOVING = 1 << 20
"""Size in bytes from which memory is offloaded."""

_AHEAD = 4
"""Number of prefetched copies."""


class HostMemory:
    """Hooks for saved tensors that copy large ones to host memory, and back in reverse order.

    Copies run on a separate stream, and are prefetched. Storages are copied, not tensors: views of one storage are
    copied once and keep their layout. What stays is given to `values`, if memory may be changed in place meanwhile.
    """

    def __init__(self, module: nn.Module, values: KeptValues | None = None) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        self._stay = {tensor.untyped_storage()._cdata for tensor in tensors}
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        self._stream = side_stream(device, "activations") if device.type == "cuda" else None
        self._known: dict[int, _Known] = {}
        self._sent: deque[weakref.ref[_OnHost]] = deque()
        self.values = values
        if values is not None and self._stream is not None:
            values.before_changes.append(self._await_copy)

    def pack(self, tensor: Tensor) -> Tensor | Kept | _Moved:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        too_small = size < _WORTH_MOVING or 2 * tensor.nbytes < size or size % tensor.itemsize
        if too_small or storage._cdata in self._stay or isinstance(tensor, nn.Parameter):
            return tensor if self.values is None else self.values.keep(tensor)
        memory = self._on_host(tensor, storage)
        memory.uses += 1
        return _Moved(memory, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def unpack(self, packed: Tensor | Kept | _Moved) -> Tensor:
        if not isinstance(packed, _Moved):
            return packed.value if isinstance(packed, Kept) else packed
        while self._sent and self._sent[-1]() in (None, packed.memory):
            self._sent.pop()
        for reference in list(self._sent)[-_AHEAD:]:
            if (coming := reference()) is not None:
                coming.send()
        return packed.memory.take().view(packed.dtype).as_strided(packed.shape, packed.stride, packed.offset)

    def _await_copy(self, storage: int) -> None:
        """Let changes of memory wait until it is copied."""
        if storage in self._known and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _on_host(self, tensor: Tensor, storage: torch.UntypedStorage) -> _OnHost:
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known.version == tensor._version and not known.of.expired():
            on_host = known.copy()
            if on_host is not None:
                return on_host
        whole = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
        on_host = _OnHost(whole.view(torch.uint8), self._stream)
        self._known[key] = _Known(StorageWeakRef(storage), tensor._version, weakref.ref(on_host))
        self._sent.append(weakref.ref(on_host))
        return on_host


class _OnHost:
    """A storage copied to the host; `uses` counts the saved tensors that need it."""

    def __init__(self, memory: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.uses = 0
        self._device = memory.device
        self._stream = stream
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._memory = torch.empty_like(memory, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self._memory.copy_(memory)
            return
        stream.wait_stream(torch.cuda.current_stream(memory.device))
        with torch.cuda.stream(stream):
            self._memory.copy_(memory, non_blocking=True)
        memory.record_stream(stream)

    def send(self) -> None:
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._memory.to(self._device)
            return
        with torch.cuda.stream(self._stream):
            self._back = self._memory.to(self._device, non_blocking=True)
            self._arrived = self._stream.record_event()

    def take(self) -> Tensor:
        self.send()
        back = self._back
        assert back is not None
        if self._arrived is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(self._arrived)
            back.record_stream(here)
        self.uses -= 1
        if not self.uses:
            self._back = self._arrived = None
        return back


class _Moved(NamedTuple):
    """A tensor whose storage is on the host."""

    memory: _OnHost
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class _Known(NamedTuple):
    """A storage that has been copied, valid while its version is the same."""

    of: StorageWeakRef
    version: int
    copy: weakref.ref[_OnHost]
