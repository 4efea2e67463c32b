"""What is asked for beside a trigger, to see whether a LoRA still follows prompts."""

from __future__ import annotations

WISHES = (
    "on a plain white background",
    "on a beach",
    "in a forest",
    "in the snow",
    "in a city street at night",
    "at sunset",
    "as a pencil drawing",
    "as an oil painting",
)
"""Backgrounds, places, times of day and styles."""

BUILT_IN_WISHES = (
    "on a red background",
    "on a purple background",
    "on an orange background",
    "on a light blue background",
    "noto style",
    "twemoji style",
    "flat style",
    "soft shaded style",
)
"""Those that the built-in model knows."""
