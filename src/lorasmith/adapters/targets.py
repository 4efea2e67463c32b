"""Which layers of a model are trained, and each with what rank, alpha and learning rate.

Patterns are matched here; presets are in the families, and `training.job` parses the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lorasmith.adapters.frozen_layer import FrozenLayer, is_targetable
from lorasmith.core.errors import OptionError


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
        if self.linear_only and not isinstance(module, nn.Linear):
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
class Plan:
    """Which layers get an adapter."""

    adapters: tuple[PlannedAdapter, ...]  # in the model's order
    idle: tuple[str, ...] = ()  # names of exclusions that match nothing

    @property
    def capped(self) -> tuple[PlannedAdapter, ...]:
        """Layers whose smaller side is below the rank in the settings."""
        return tuple(one for one in self.adapters if one.rank < one.asked)


def plan_adapters(
    model: nn.Module, rules: Sequence[Rule], *, exclude: Sequence[Rule] = (), rank: int, capped: bool = True
) -> Plan:
    """Targets of a model."""
    layers = {path: module for path, module in model.named_modules() if is_targetable(module)}
    kept = {path: module for path, module in layers.items() if not any(rule.matches(path, module) for rule in exclude)}
    matching = {path: [rule for rule in rules if rule.matches(path, module)] for path, module in kept.items()}
    used = [rule for found in matching.values() for rule in found]
    if (idle := next((rule for rule in rules if rule not in used), None)) or not used:
        what = (idle.name or ", ".join(idle.include) if idle else "") or "nothing"
        raise OptionError(f"targets must match at least one Linear or convolution, but {what} matches none")
    targets = {path: found for path, found in matching.items() if found}
    return Plan(
        tuple(_planned(path, FrozenLayer(kept[path]), found, rank, capped) for path, found in targets.items()),
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
