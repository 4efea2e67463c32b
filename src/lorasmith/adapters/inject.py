"""Finding targets in a model, making adapters for them, attaching them, and taking them off again.

Attaching replaces the `forward` of the targeted layer objects; no module, parameter or name of the model changes, so
the model is exactly as before once the context manager is left, whatever ended it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lorasmith.adapters import lora  # noqa: F401  (algorithms register themselves)
from lorasmith.adapters.base import ADAPTERS, Adapter, FrozenLayer, FrozenProduct, is_targetable
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError, OptionError

__all__ = ["Attached", "Plan", "PlannedAdapter", "attached", "create_adapters", "load_adapters", "plan_adapters"]


@dataclass(frozen=True)
class PlannedAdapter:
    """One layer that will get a fresh adapter.

    Attributes:
        path: module path.
        rank: the rank it will have, at most the layer's smaller side.
    """

    path: str
    rank: int


@dataclass(frozen=True)
class Plan:
    """Which layers get an adapter, and of which rank.

    Attributes:
        adapters: in the model's order.
        rank: the rank that was asked for; layers smaller than it got less.
    """

    adapters: tuple[PlannedAdapter, ...]
    rank: int

    @property
    def capped(self) -> tuple[PlannedAdapter, ...]:
        """Layers whose smaller side is below the rank that was asked for."""
        return tuple(one for one in self.adapters if one.rank < self.rank)


@dataclass(frozen=True)
class Attached:
    """A set of adapters on one model at one strength."""

    adapters: Mapping[str, Adapter]
    strength: float = 1.0


def plan_adapters(
    model: nn.Module,
    *,
    include: Sequence[str],
    exclude: Sequence[str] = (),
    linear_only: bool = False,
    rank: int,
) -> Plan:
    """Targets of a model.

    Args:
        model: the model.
        include, exclude: patterns on module paths as `fnmatch` reads them, where `*` crosses dots.
        linear_only: leave convolutions out.
        rank: rank asked for; it is capped at each layer's smaller side, above which it could add nothing.

    Raises:
        OptionError: no layer matches.
    """
    planned = []
    for path, module in model.named_modules():
        if not is_targetable(module) or (linear_only and not isinstance(module, nn.Linear)):
            continue
        if _matches(path, include) and not _matches(path, exclude):
            layer = FrozenLayer(module)
            planned.append(PlannedAdapter(path, min(rank, layer.in_features, layer.out_features)))
    if not planned:
        patterns = ", ".join(include) or "nothing"
        raise OptionError(f"targets must match at least one Linear or convolution, but {patterns} matches none")
    return Plan(tuple(planned), rank)


def create_adapters(
    model: nn.Module, plan: Plan, *, algorithm: str, alpha: float | None, seed: int, zero: str
) -> dict[str, Adapter]:
    """Fresh adapters for a plan, by module path, in fp32 on the CPU.

    Args:
        model: the model that the plan was made for.
        plan: targets and ranks.
        algorithm: registered adapter name.
        alpha: numerator of the scale; None takes the rank asked for, which makes the scale 1 for uncapped layers.
        seed: key of the initial values, together with each module path.
        zero: `up` or `down`, the factor that starts at zero.
    """
    kind = ADAPTERS[algorithm]
    return {
        one.path: kind.create(
            FrozenLayer(model.get_submodule(one.path)),
            rank=one.rank,
            # A capped layer keeps the scale alpha / rank of the others.
            alpha=one.rank if alpha is None else alpha * one.rank / plan.rank,
            seed=seed,
            path=one.path,
            zero=zero,
        )
        for one in plan.adapters
    }


def load_adapters(model: nn.Module, weights: Mapping[str, AdapterWeights]) -> dict[str, Adapter]:
    """Adapters with given tensors, by module path.

    Raises:
        LoraError: an algorithm is unknown, or the model has no such layer or one of another shape.
    """
    layers = dict(model.named_modules())
    adapters = {}
    for path, one in weights.items():
        if path not in layers or not isinstance(getattr(layers[path], "weight", None), Tensor):
            raise LoraError(f"the LoRA is for a layer {path} that the model lacks; it was made for another model")
        adapters[path] = ADAPTERS[one.algorithm].from_weights(one, FrozenLayer(layers[path]))
    return adapters


@contextlib.contextmanager
def attached(model: nn.Module, stack: Sequence[Attached]) -> Iterator[None]:
    """Run `model` with adapters in activation space; later sets wrap earlier ones, those of an enclosing call too."""
    by_path: dict[str, list[tuple[Adapter, float]]] = {}
    for one in stack:
        for path, adapter in one.adapters.items():
            by_path.setdefault(path, []).append((adapter, one.strength))
    with contextlib.ExitStack() as undo:
        for path, adapters in by_path.items():
            module = model.get_submodule(path)
            own = module.__dict__.get("forward")
            undo.callback(_restore_forward, module, own)
            below = own.adapters if isinstance(own, _Stacked) else ()
            module.forward = _Stacked(FrozenLayer(module), (*below, *adapters))
        yield


class _Stacked:
    """A layer's forward under a stack of adapters, innermost first."""

    def __init__(self, layer: FrozenLayer, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self.adapters = adapters
        self._layer = layer
        self._bias_last = layer.bias is not None and any(adapter.transforms_output for adapter, _ in adapters)
        self._run: Callable[[Tensor], Tensor] = FrozenProduct(layer, with_bias=not self._bias_last)
        for adapter, strength in adapters:
            self._run = _wrapped(adapter, self._run, layer, strength)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._run(x)
        return y + _as_channels(self._layer) if self._bias_last else y


def _wrapped(
    adapter: Adapter, inner: Callable[[Tensor], Tensor], layer: FrozenLayer, strength: float
) -> Callable[[Tensor], Tensor]:
    return lambda x: adapter.attached(inner, layer, x, strength)


def _restore_forward(module: nn.Module, own: Callable[..., Tensor] | None) -> None:
    """Give the instance back its own forward, or leave it with its class's."""
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = own


def _as_channels(layer: FrozenLayer) -> Tensor:
    """The bias, shaped to add to the layer's output."""
    bias = layer.bias
    assert bias is not None
    return bias.reshape(-1, *(1,) * (layer.weight.ndim - 2)) if layer.is_conv else bias


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
