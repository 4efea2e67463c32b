"""What must hold of what a proof finds, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def failed(found: Mapping[str, Any]) -> list[str]:
    """Names of what does not hold."""
    return [name for name, value in found.items() if not limit_of(name)(value)]


def limit_of(name: str) -> Callable[[Any], bool]:
    """What must hold of something found, whose name may end in what it was found of."""
    if name in ("gradient as shipped", "losses", "steps", "keys", "crash", "built-in fails") or name.startswith(
        ("s/", "MB")
    ):
        return lambda value: True
    return next(limit for start, limit in LIMITS.items() if name.startswith(start))


LIMITS: dict[str, Callable[[Any], bool]] = {
    "loss": lambda value: value < 1e-5,
    "gradient": lambda value: value < 1e-4,
    "left out": lambda value: value == 0,
    "merged": lambda value: value < 1e-3,
    "same bits": lambda value: value is True,
    "same bits after an error": lambda value: value is True,
    "error": lambda value: False,
    "inputs": lambda value: value is True,
    "interrupted": lambda value: value is True,
    "resumed": lambda value: value is True,
    "heard": lambda value: value is True,
    "apart": lambda value: value is True,
    "released": lambda value: value is True,
    "copied": lambda value: value < 0.5,
    "image-to-image refused": lambda value: value is True,
    "known again": lambda value: value is True,
    "ran": lambda value: value is True,
    "went on": lambda value: value is True,
    "refused": lambda value: value.startswith("learning_rate must be") and "\n" not in value,
    "sentence": lambda value: "\n" not in value,
    "saved": lambda value: value == 1,
    **dict.fromkeys(("drawn", "validated", "compared"), lambda value: value is True),
}
"""What must hold, by what is found."""
