"""The list of algorithms: a summary of each, what `rank` and `alpha` mean, which variants and settings it takes.

Plain data without torch, so that help texts and configurations load fast. The class of each is in the module of its
name (`algorithms`). An algorithm of an extension has its facts in its class, as `about`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.core.errors import LoraError
from lorasmith.core.options import Option
from lorasmith.core.registry import Registry

STRENGTH = Option("strength", float, 1.0, help="Strength of the LoRA: 1 is as trained, 0 disables it.")
"""The strength at which a LoRA is applied: any finite number."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm, for help texts and defaults."""

    summary: str  # one sentence
    rank_meaning: str = "rank"  # what the setting `rank` is here: `rank`, `factor`, `block size`, or `` for nothing
    # default of alpha; None is the rank, for adapters that are scaled by alpha / rank
    default_alpha: float | None = None
    # settings of `TrainConfig` that this algorithm supports and not every other does
    variants: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()  # settings of `TrainConfig` that have no effect on this algorithm
    with_dora: str = ""  # its name with DoRA's magnitudes, where that is not `X with DoRA`
    # factor of the model's learning rate for LoRA when none is given, at which it learns about as much in as many
    # steps as LoRA does (`benchmarks/learning_rates.py`)
    learning_rate_factor: float = 1.0


_EVERY_VARIANT = frozenset(
    {"dora", "rslora", "pissa", "init", "tucker", "tlora", "lora_plus_ratio", "rank_dropout", "module_dropout"}
)

ALGORITHMS: Mapping[str, Algorithm] = {
    "LoRA": Algorithm(
        summary="Adds a product of two narrow matrices; every program loads it.",
        variants=_EVERY_VARIANT,
        with_dora="DoRA",
    ),
    "LoHa": Algorithm(
        summary="Multiplies two low-rank products entry by entry, which reaches the square of the rank.",
        variants=frozenset({"dora", "rslora"}),
    ),
    "LoKr": Algorithm(
        summary="Adds a Kronecker product of two small matrices; files are very small.",
        rank_meaning="factor",
        default_alpha=1.0,
        variants=frozenset({"dora"}),
        unused=frozenset({"alpha"}),
        learning_rate_factor=3.0,
    ),
    "OFT": Algorithm(
        summary="Rotates blocks of a layer's outputs, which keeps the angles between them.",
        rank_meaning="block size",
        default_alpha=0.0,
        unused=frozenset({"zero_init"}),
    ),
    "BOFT": Algorithm(
        summary="Rotates outputs in several shuffled stages, so that small blocks mix all of them.",
        rank_meaning="block size",
        default_alpha=0.0,
        unused=frozenset({"zero_init"}),
        learning_rate_factor=0.1,
    ),
    "GLoRA": Algorithm(summary="Adds a low-rank change of the weight's inputs to one of its outputs."),
    "Full": Algorithm(
        summary="Trains a difference of the weight's own size: the most it can learn, and the largest files.",
        rank_meaning="",
        default_alpha=1.0,
        unused=frozenset({"rank", "alpha", "zero_init"}),
        learning_rate_factor=0.1,
    ),
}
"""Facts of the built-in algorithms by name, in the order in which choices are shown; `facts_of` has those of all."""


def _checked(name: str, adapter: Any) -> Any:
    needed = ("create", "from_weights", "merged", "attached", "algorithm", "format")
    if not all(hasattr(adapter, name) for name in needed) or adapter.__abstractmethods__:
        raise TypeError("it must be a concrete subclass of lorasmith.adapters.adapter.Adapter with a format")
    if adapter.algorithm != name.casefold():
        raise TypeError(f"its attribute algorithm must be {name.casefold()!r}, got {adapter.algorithm!r}")
    if name not in ALGORITHMS and not isinstance(getattr(adapter, "about", None), Algorithm):
        raise TypeError("its attribute about must be a lorasmith.adapters.catalogue.Algorithm")
    return adapter


ADAPTERS: Registry[Any] = Registry(
    "adapter algorithm",
    LoraError,
    group="adapters",
    names=ALGORITHMS,
    home="lorasmith.adapters.algorithms",
    checked=_checked,
)


INITS: Registry[Any] = Registry("init", group="inits", names=("LoRA-GA",), home="lorasmith.adapters.inits")
"""Starts of adapters, functions of an `inits.InitLayer`."""


def facts_of(algorithm: str) -> Algorithm:
    """The facts of an algorithm. Imports that of an extension. Raises LoraError if it is unknown or cannot be used."""
    name = ADAPTERS.canonical(algorithm)
    facts: Algorithm = ALGORITHMS[name] if name in ALGORITHMS else ADAPTERS[name].about
    return facts


def known_facts(algorithm: str) -> Algorithm | None:
    """The same without an import: None for unknown algorithms, and for those of extensions not imported yet."""
    is_known = algorithm in ADAPTERS and (ADAPTERS.canonical(algorithm) in ALGORITHMS or ADAPTERS.imported(algorithm))
    return facts_of(algorithm) if is_known else None


def rank_words(algorithm: str, rank: int | None = None) -> str:
    """An algorithm's `rank` for messages: `rank 8`, `factor 8`, `block size 8`; empty where it has none."""
    meaning = facts_of(algorithm).rank_meaning
    return meaning if rank is None or not meaning else f"{meaning} {rank}"
