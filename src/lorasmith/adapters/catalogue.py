"""The algorithms in words: what each is, what `rank` and `alpha` mean to it, which variants and settings it takes.

Plain data without torch, so that help texts and configurations can use it at no cost. It is the list of algorithms too:
the class of each is in the module of its name (`algorithms`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ALGORITHMS", "Algorithm", "rank_words"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What people should know of an algorithm before they choose it.

    Attributes:
        summary: one sentence.
        rank_meaning: what the number that is given as `rank` is: `rank`, `factor`, `block size`, or `` for nothing.
        default_alpha: alpha when nothing is said; None is the rank, for adapters that are scaled by alpha / rank.
        variants: settings of `TrainConfig` that it takes and not every algorithm does.
        unused: settings of `TrainConfig` that every algorithm accepts and that change nothing for this one.
        with_dora: what it is called with DoRA's magnitudes, where that is not `X with DoRA`.
        learning_rate_factor: what the model's learning rate for LoRA is multiplied by when none is given, so that it
            learns about as much in as many steps as LoRA does (`benchmarks/learning_rates.py`).
    """

    summary: str
    rank_meaning: str = "rank"
    default_alpha: float | None = None
    variants: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    with_dora: str = ""
    learning_rate_factor: float = 1.0


_EVERY_VARIANT = frozenset({"dora", "rslora", "pissa", "tucker", "lora_plus_ratio", "rank_dropout", "module_dropout"})

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
"""Registered name → facts, in the order in which choices are shown."""


def rank_words(algorithm: str, rank: int | None = None) -> str:
    """How to speak of an algorithm's `rank`: `rank 8`, `factor 8`, `block size 8`; empty where it has none.

    Args:
        algorithm: registered name in any case.
        rank: the number, None for the bare word.
    """
    folded = {name.casefold(): facts for name, facts in ALGORITHMS.items()}
    meaning = folded[algorithm.casefold()].rank_meaning
    return meaning if rank is None or not meaning else f"{meaning} {rank}"
