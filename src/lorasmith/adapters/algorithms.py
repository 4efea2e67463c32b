"""Every algorithm of the catalogue, imported so that it is registered, and the format of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from lorasmith.adapters.adapter import ADAPTERS
from lorasmith.adapters.catalogue import ALGORITHMS
from lorasmith.adapters.catalogue import facts_of as facts_of
from lorasmith.core.adapter_state import AdapterFormat, AdapterWeights

for _name in ALGORITHMS:
    import_module(f"lorasmith.adapters.{_name.casefold()}")  # the module of an algorithm has its name


def algorithms() -> Iterator[tuple[str, AdapterFormat]]:
    """Name, as `AdapterWeights` has it, and format of every algorithm."""
    return ((name.casefold(), adapter.format) for name, adapter in ADAPTERS.items())


def algorithm_names() -> tuple[str, ...]:
    """Names of every algorithm in order: a key for caches, which programs that register more invalidate."""
    return tuple(ADAPTERS.usable())


def format_named(algorithm: str) -> AdapterFormat:
    """The format of an algorithm. Raises LoraError for unknown names."""
    return ADAPTERS[algorithm].format


def format_of(weights: AdapterWeights) -> AdapterFormat:
    """The format of an adapter's algorithm. Raises LoraError for one that is unknown."""
    return format_named(weights.algorithm)


def size_of(weights: AdapterWeights) -> int | None:
    """The value of `rank` that made an adapter, from its tensors, for algorithms where it is not a rank; else None."""
    size = format_of(weights).size
    return None if size is None else size({role: tensor.shape for role, tensor in weights.tensors.items()})


def title_of(weights: AdapterWeights) -> str:
    """Display name of an adapter's algorithm; a LoRA with magnitudes is a DoRA."""
    name = ADAPTERS.canonical(weights.algorithm)
    return (facts_of(name).with_dora or f"{name} with DoRA") if "dora_scale" in weights.tensors else name
