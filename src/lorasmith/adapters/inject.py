"""Adapters on a model: which layers are trained, creating adapters for them, attaching and detaching.

Target presets are in the families, and `training.job` parses the settings. Attaching replaces the `forward` of
the targeted layer objects; no module, parameter or name of the model changes, so leaving the context manager restores
the model exactly. Layers of one attention that receive the same input (q, k, v) are computed together.

Norms and biases, which no low-rank product fits, have additive differences (LyCORIS' Norm, ComfyUI's BiasDiff):

    weight' = weight + Δ   of a norm,   bias' = bias + Δ   of any layer

A norm's output is linear in its weight and bias, so it is norm(x; weight, bias) + norm(x; Δ, Δ'): half precision would
lose a small Δ in the sum of the weights. Files call these tensors `diff` and `diff_b`, or `w_norm` and `b_norm`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters import algorithms  # noqa: F401  registers every algorithm
from lorasmith.adapters.adapter import ADAPTERS, Adapter, copied
from lorasmith.adapters.frozen_layer import FrozenLayer, FrozenProduct, Products, is_linear, is_targetable
from lorasmith.adapters.lora import LowRank, LowRankTerm, RunTerms, linear_with_lora
from lorasmith.adapters.variants import Variant, dora_from_weights, fresh_adapter
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError, OptionError


@dataclass(frozen=True)
class Rule:
    """A choice of layers, and their settings."""

    include: tuple[str, ...]  # patterns on module paths as `fnmatch` reads them, where `*` crosses dots
    exclude: tuple[str, ...] = ()  # patterns on module paths that this rule leaves out
    linear_only: bool = False
    rank: int | None = None  # None leaves it to an earlier rule that matches too, or to the run
    alpha: float | None = None
    learning_rate: float | None = None
    name: str = ""  # for errors

    def matches(self, path: str, module: nn.Module) -> bool:
        """Whether a layer that can carry an adapter is chosen."""
        if self.linear_only and not is_linear(module):
            return False
        return _matches(path, self.include) and not _matches(path, self.exclude)


@dataclass(frozen=True)
class PlannedAdapter:
    """One layer that will get a fresh adapter."""

    path: str
    rank: int  # its rank, at most the layer's smaller side for algorithms of low rank
    asked: int  # the rank in the settings
    alpha: float | None = None  # None for the run's
    learning_rate: float | None = None  # None for the run's


@dataclass(frozen=True)
class AdapterPlan:
    """Which layers get an adapter."""

    adapters: tuple[PlannedAdapter, ...]  # in the model's order
    idle: tuple[str, ...] = ()  # names of exclusions that match nothing

    @property
    def capped(self) -> tuple[PlannedAdapter, ...]:
        """Layers whose smaller side is below the rank in the settings."""
        return tuple(planned for planned in self.adapters if planned.rank < planned.asked)


def plan_adapters(
    model: nn.Module, rules: Sequence[Rule], *, exclude: Sequence[Rule] = (), rank: int, capped: bool = True
) -> AdapterPlan:
    """Targets of a model."""
    layers = {path: module for path, module in model.named_modules() if is_targetable(module)}
    kept = {path: module for path, module in layers.items() if not any(rule.matches(path, module) for rule in exclude)}
    matching = {path: [rule for rule in rules if rule.matches(path, module)] for path, module in kept.items()}
    used = [rule for rules_of in matching.values() for rule in rules_of]
    if (idle := next((rule for rule in rules if rule not in used), None)) or not used:
        what = (idle.name or ", ".join(idle.include) if idle else "") or "nothing"
        raise OptionError(f"targets must match at least one Linear or convolution, but {what} matches none")
    targets = {path: rules_of for path, rules_of in matching.items() if rules_of}
    return AdapterPlan(
        tuple(_planned(path, FrozenLayer(kept[path]), rules_of, rank, capped) for path, rules_of in targets.items()),
        tuple(rule.name for rule in exclude if not any(rule.matches(*layer) for layer in layers.items())),
    )


def _planned(path: str, layer: FrozenLayer, rules: Sequence[Rule], rank: int, capped: bool) -> PlannedAdapter:
    alpha = learning_rate = None
    for rule in rules:
        rank = rank if rule.rank is None else rule.rank
        alpha = alpha if rule.alpha is None else rule.alpha
        learning_rate = learning_rate if rule.learning_rate is None else rule.learning_rate
    most = min(layer.in_features, layer.out_features) if capped else rank
    return PlannedAdapter(path, min(rank, most), rank, alpha, learning_rate)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def is_norm(module: nn.Module) -> bool:
    """Whether a module has a one-dimensional weight of its own, by which norms scale their output."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


class Dial:
    """A strength that may change between two evaluations of a model; at 0 its adapters are left out."""

    def __init__(self) -> None:
        self.strength = 1.0

    @contextlib.contextmanager
    def turned(self, strength: float) -> Iterator[None]:
        """Inside the context, which includes the backward pass, the adapters have this strength."""
        before, self.strength = self.strength, strength
        try:
            yield
        finally:
            self.strength = before


def strength_now(strength: float | Dial) -> float:
    """A strength as it is at the moment."""
    return strength.strength if isinstance(strength, Dial) else strength


def lacking(path: str, name: str, *, is_layer: bool) -> str:
    """The message for a LoRA that changes a parameter which the model lacks; `is_layer`: whether it has the layer."""
    if name == "bias" and is_layer:
        return (
            f"a LoRA must not add biases to layers without one, but this one does to {path}, as PEFT's lora_bias=True "
            "makes it; train it with lora_bias=False"
        )
    return f"the LoRA changes {path}.{name}, which the model lacks; it was made for another model"


class Difference(nn.Module):
    """Additive differences of one module's parameters."""

    def __init__(self, differences: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in differences.items():
            self.register_parameter(name, nn.Parameter(tensor))

    @classmethod
    def create(cls, module: nn.Module) -> Difference:
        """Zeros for a norm's weight and bias, or for a layer's bias."""
        names = ("weight", "bias") if is_norm(module) else ("bias",)
        parameters = {name: getattr(module, name) for name in names if getattr(module, name, None) is not None}
        return cls({name: torch.zeros(parameter.shape) for name, parameter in parameters.items()})

    @classmethod
    def from_tensors(cls, differences: Mapping[str, Tensor], module: nn.Module, path: str) -> Difference:
        """Differences with given values. Raises LoraError when they do not fit the module."""
        for name, tensor in differences.items():
            shape = getattr(getattr(module, name, None), "shape", None)
            if shape != tensor.shape:
                if shape is None:
                    raise LoraError(lacking(path, name, is_layer=is_targetable(module)))
                raise LoraError(
                    f"a difference of shape {tuple(tensor.shape)} is for {path}.{name}, which has shape "
                    f"{tuple(shape)}; the LoRA was made for another model"
                )
        return cls({name: copied(tensor) for name, tensor in differences.items()})

    def to_tensors(self) -> dict[str, Tensor]:
        """The differences as data, in fp32 on the CPU."""
        return {name: copied(parameter) for name, parameter in self.named_parameters()}

    def on_norm(self, norm: nn.Module, forward: Callable[..., Tensor], strength: float | Dial) -> Callable[..., Tensor]:
        """A norm's forward with the differences added to its current parameters."""

        def changed(*args: Any, **kwargs: Any) -> Tensor:
            y = forward(*args, **kwargs)
            now = strength_now(strength)
            return y + now * self._alone(norm, forward, *args, **kwargs) if now else y

        return changed

    def _alone(self, norm: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The forward with the differences in place of the norm's parameters."""
        own, mine = norm._parameters, dict(self.named_parameters())
        kept = dict(own)
        try:
            for name, parameter in kept.items():
                if parameter is not None:
                    own[name] = mine[name] if name in mine else nn.Parameter(torch.zeros_like(parameter), False)
            return forward(*map(_with_gradient, args), **kwargs)
        finally:
            own.update(kept)


def _with_gradient(value: Any) -> Any:
    """An input that requires a gradient: torch's channels-last group norm (2.13, CPU) crashes if only weights do."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad and torch.is_grad_enabled():
        return value.detach().requires_grad_()
    return value


_SAME_INPUT = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
"""Names of the layers of an attention, in diffusers' models, that receive the same input."""

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Attached:
    """A set of adapters on one model at one strength."""

    adapters: Mapping[str, Adapter]  # by path of a Linear or convolution
    strength: float | Dial = 1.0  # 1 is as trained
    differences: Mapping[str, Difference] = field(default_factory=dict)  # by path of a norm, Linear or convolution


def create_adapters(
    model: nn.Module,
    plan: AdapterPlan,
    *,
    algorithm: str,
    alpha: float | None,
    seed: int,
    zero: str,
    variant: Variant | None = None,
) -> dict[str, Adapter]:
    """Fresh adapters for a plan, by module path, in fp32 on the CPU."""
    variant = variant or Variant()
    return {
        planned.path: fresh_adapter(
            FrozenLayer(model.get_submodule(planned.path)),
            algorithm,
            variant,
            rank=planned.rank,
            alpha=variant.stored_alpha(
                algorithm, planned.alpha if planned.alpha is not None else alpha, planned.rank, planned.asked
            ),
            seed=seed,
            path=planned.path,
            zero=zero,
        )
        for planned in plan.adapters
    }


def load_adapters(model: nn.Module, weights: Mapping[str, AdapterWeights]) -> dict[str, Adapter]:
    """Adapters with given tensors, by module path."""
    layers = dict(model.named_modules())
    adapters: dict[str, Adapter] = {}
    for path, module_weights in weights.items():
        if path not in layers or not isinstance(getattr(layers[path], "weight", None), Tensor):
            raise LoraError(f"the LoRA is for a layer {path} that the model lacks; it was made for another model")
        layer = FrozenLayer(layers[path])
        if "dora_scale" in module_weights.tensors:
            adapters[path] = dora_from_weights(module_weights, layer)
        else:
            adapters[path] = ADAPTERS[module_weights.algorithm].from_weights(module_weights, layer)
    return adapters


def load_differences(model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Difference]:
    """Differences with given tensors, by module path. Raises LoraError when the model lacks a parameter."""
    modules = dict(model.named_modules())
    if missing := next((path for path in tensors if path not in modules), None):
        raise LoraError(f"the LoRA changes {missing}, which the model lacks; it was made for another model")
    return {path: Difference.from_tensors(tensor, modules[path], path) for path, tensor in tensors.items()}


@contextlib.contextmanager
def adapters_attached(model: nn.Module, stack: Sequence[Attached]) -> Iterator[None]:
    """Adapters run on `model` in activation space inside; later sets wrap earlier ones and those of enclosing calls."""
    with contextlib.ExitStack() as undo:
        for path, forward in attached_forwards(model, stack).items():
            undo.enter_context(forward_replaced(model.get_submodule(path), forward))
        yield


def attached_forwards(model: nn.Module, stack: Sequence[Attached]) -> dict[str, Forward]:
    """The forwards that `adapters_attached` gives to modules, by path, for the model as it is now."""
    layers: dict[str, _OnLayer] = {}
    forwards: dict[str, Forward] = {}
    for attached in stack:
        for path, adapter in attached.adapters.items():
            if not is_targetable(kind := model.get_submodule(path)):
                raise LoraError(
                    f"the LoRA has an adapter on {path} ({type(kind).__name__}), which can be merged into its weight "
                    "alone; leave bypass off, and to train further, continue with a LoRA without it"
                )
            layers.setdefault(path, _OnLayer()).adapters.append((adapter, attached.strength))
        for path, difference in attached.differences.items():
            if is_targetable(module := model.get_submodule(path)):
                layers.setdefault(path, _OnLayer()).biases.append((difference, attached.strength))
            else:
                forwards[path] = difference.on_norm(module, forwards.get(path, module.forward), attached.strength)
    stacked = {}
    for path, on_layer in layers.items():
        module = model.get_submodule(path)
        stacked[path] = _Stacked(FrozenLayer(module), on_layer.above(module.__dict__.get("forward")))
    _share_inputs(model, stacked)
    return {path: layer.run for path, layer in stacked.items()} | forwards


def adapters_of(forward: object) -> list[Adapter]:
    """The adapters in a layer's forward, innermost first."""
    return [adapter for adapter, _ in _OnLayer().above(forward).adapters]


def low_rank_of(forward: object) -> tuple[LowRank, FrozenLayer, float | Dial] | None:
    """Adapter, layer and strength in a Linear layer's forward, if a low-rank one is all that is there."""
    stacked = _stacked(forward)
    return None if stacked is None or stacked.on_layer.biases else stacked.single


def on_product(forward: object, product: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], bool]:
    """The adapters and differences in a layer's forward on another product than the layer's own.

    Returns also whether the bias is part of that product; otherwise the function adds it.
    """
    stacked = _stacked(forward)
    if stacked is None:  # the layer itself
        return product, True
    layer = _Stacked(stacked.layer, stacked.on_layer, product)
    return layer.run, not layer.adds_bias


def adapters_on(module: nn.Module) -> list[Adapter]:
    """The adapters attached to a layer now, innermost first."""
    return adapters_of(module.__dict__.get("forward"))


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Inside the context, a module has this forward, a method.

    torch.compile distinguishes methods by their function, and other objects one by one.
    """
    own = module.__dict__.get("forward")
    stacked = _stacked(own)
    shared = None if stacked is None or stacked.shared is None else stacked.shared[0]
    was_complete = shared is not None and shared.is_complete
    try:
        if shared is not None:
            shared.is_complete = False
        module.forward = forward
        yield
    finally:
        restore_forward(module, own)
        if shared is not None:
            shared.is_complete = was_complete


def restore_forward(module: nn.Module, own: Callable[..., Tensor] | None) -> None:
    """Restore the instance's own forward, or that of its class if `own` is None."""
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = own


@dataclass
class _OnLayer:
    """What is attached to one layer, innermost first."""

    adapters: list[tuple[Adapter, float | Dial]] = field(default_factory=list)
    biases: list[tuple[Difference, float | Dial]] = field(default_factory=list)

    def above(self, forward: object) -> _OnLayer:
        """This on top of what an enclosing call has attached, if `forward` is that call's."""
        stacked = _stacked(forward)
        inner = _OnLayer() if stacked is None else stacked.on_layer
        return _OnLayer([*inner.adapters, *self.adapters], [*inner.biases, *self.biases])


class _Stacked:
    """A layer's forward under a stack of adapters, on the layer's own product if no other is given."""

    def __init__(
        self, layer: FrozenLayer, on_layer: _OnLayer, product: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.layer = layer
        self.on_layer = on_layer
        self.shared: tuple[_SharedByOneRun, int] | None = None
        adapters = on_layer.adapters
        self.adds_bias = layer.bias is not None and any(adapter.transforms_output for adapter, _ in adapters)
        self._run = product or FrozenProduct(layer, with_bias=not self.adds_bias)
        for number, (adapter, strength) in enumerate(adapters):
            seen = _LayerAbove(layer, adapters[:number]) if number and adapter.reads_weight else layer
            self._run = _wrapped(adapter, self._run, seen, strength)

    @property
    def single(self) -> tuple[LowRank, FrozenLayer, float | Dial] | None:
        """Adapter, layer and strength, if it is the only one and can be computed together with other layers'."""
        if len(self.on_layer.adapters) != 1:
            return None
        adapter, strength = self.on_layer.adapters[0]
        takes = type(adapter).attached is LowRank.attached and not self.layer.is_conv
        if not isinstance(adapter, LowRank) or not takes:
            return None
        return adapter, self.layer, strength

    def run(self, x: Tensor) -> Tensor:
        """The layer's forward."""
        y = None if self.shared is None or torch.compiler.is_compiling() else self.shared[0](self.shared[1], x)
        if y is None:
            y = self._run(x)
        if self.adds_bias:
            assert self.layer.bias is not None
            y = y + self.layer.channelwise(self.layer.bias)
        for difference, strength in self.on_layer.biases:
            y = y + strength_now(strength) * self.layer.channelwise(difference.get_parameter("bias"))
        return y


def _stacked(forward: object) -> _Stacked | None:
    """The `_Stacked` of an attached layer's forward, or None."""
    owner = getattr(forward, "__self__", None)
    return owner if isinstance(owner, _Stacked) else None


def input_groups(model: nn.Module, paths: Iterable[str]) -> list[list[str]]:
    """Those of the Linear layers at these paths that receive the same input, by attention: two or more each."""
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for path in paths:
        parent, _, name = path.rpartition(".")
        names = next((names for names in _SAME_INPUT if name in names), None)
        if names is None:
            continue
        # Cross-attention has its keys and values from the text.
        is_text = getattr(model.get_submodule(parent), "is_cross_attention", False) and name != names[0]
        groups[parent, names, is_text, FrozenLayer(model.get_submodule(path)).in_features].append(path)
    return [members for members in groups.values() if len(members) > 1]


def _share_inputs(model: nn.Module, stacked: Mapping[str, _Stacked]) -> None:
    """Let layers of one attention that receive the same input be computed together."""
    singles = {path: single for path, layer in stacked.items() if (single := layer.single) is not None}
    for paths in input_groups(model, singles):
        shared = _SharedByOneRun([singles[path] for path in paths])
        for index, path in enumerate(paths):
            stacked[path].shared = shared, index


class _LayerAbove(FrozenLayer):
    """A layer for an adapter above others: its weight includes their changes."""

    def __init__(self, layer: FrozenLayer, inner_adapters: Sequence[tuple[Adapter, float | Dial]]) -> None:
        self._inner_adapters: Sequence[tuple[Adapter, float | Dial]] = ()
        super().__init__(layer.module)
        self._inner_adapters = inner_adapters

    @contextlib.contextmanager
    def weight_acquired(self) -> Iterator[Tensor]:
        with super().weight_acquired() as weight:
            for adapter, strength in self._inner_adapters:
                weight = adapter.merged(weight, strength_now(strength))
            yield weight

    @property
    def _plain(self) -> Tensor | None:
        return None if self._inner_adapters else super()._plain

    @property
    def _products(self) -> Products | None:
        return None if self._inner_adapters else super()._products  # those multiply with the frozen weight alone


def _wrapped(
    adapter: Adapter, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, strength: float | Dial
) -> Callable[[Tensor], Tensor]:
    if isinstance(strength, Dial):
        return lambda x: adapter.attached(inner, layer, x, strength.strength) if strength.strength else inner(x)
    return lambda x: adapter.attached(inner, layer, x, strength)


class SharedInput(ABC):
    """Linear layers that receive the same input (q, k and v), with low-rank adapters: one pass for all.

    The first call computes the results of the others too, which they return when called with the same input: the down
    matrices are one product, their gradients another, and the gradient of the input is summed in place.
    """

    def __init__(self, layers: Sequence[FrozenLayer]) -> None:
        self._layers = layers
        self._x: Tensor | None = None
        self._results: dict[int, Tensor] = {}

    @abstractmethod
    def runs(self, x: Tensor) -> Sequence[RunTerms] | None:
        """The changes for an input; None if the layers must be computed separately."""

    def __call__(self, index: int, x: Tensor) -> Tensor | None:
        """`W x + b + change` of a layer; None if it must be computed separately."""
        if self._x is not x or index not in self._results:
            if (runs := self.runs(x)) is None:
                return None
            self._x = x
            biases = [layer.bias for layer in self._layers]
            self._results = dict(enumerate(linear_with_lora(x, self._layers, biases, runs)))
        result = self._results.pop(index)
        if not self._results:
            self._x = None
        return result


class _SharedByOneRun(SharedInput):
    """Adapters on layers with one input, computed together without dropout."""

    def __init__(self, members: Sequence[tuple[LowRank, FrozenLayer, float | Dial]]) -> None:
        super().__init__([layer for _, layer, _ in members])
        self.is_complete = True  # whether none of them has another adapter on top; else each is computed separately
        self._members = members

    def runs(self, x: Tensor) -> Sequence[RunTerms] | None:
        if not self.is_complete or any(adapter.mask is not None for adapter, _, _ in self._members):
            return None
        if not all(strength_now(strength) for _, _, strength in self._members):
            return None
        terms = []
        for number, (adapter, _, strength) in enumerate(self._members):
            down, up, _ = adapter.factors()
            terms.append(LowRankTerm(number, strength_now(strength) * adapter.scale, down, up, None))
        return [RunTerms(terms)]
