"""What is asked for beside a trigger, to see whether a LoRA still follows prompts."""

from __future__ import annotations

from collections.abc import Mapping

KINDS: Mapping[str, tuple[str, ...]] = {
    "Background": ("on a plain white background",),
    "Place": ("on a beach", "in a forest", "in the snow", "in a city street at night"),
    "Light": ("at sunset",),
    "Style": ("as a pencil drawing", "as an oil painting"),
}

STYLES: Mapping[str, str] = {
    "noto": "noto style",
    "twemoji": "twemoji style",
    "fluent-emoji-flat": "flat style",
    "fluent-emoji": "soft shaded style",
}
"""Words of the styles that the built-in model knows, by icon set: the first ones that the judge knows."""

BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (220, 50, 47),
    "orange": (245, 150, 50),
    "yellow": (250, 225, 90),
    "green": (70, 170, 80),
    "blue": (50, 100, 220),
    "purple": (140, 80, 190),
    "pink": (250, 170, 205),
    "grey": (150, 150, 150),
    "light blue": (150, 215, 245),
}
"""Backgrounds that the built-in model knows."""

BUILT_IN_KINDS: Mapping[str, tuple[str, ...]] = {
    "Background": (
        "on a red background",
        "on a purple background",
        "on an orange background",
        "on a light blue background",
    ),
    "Style": tuple(STYLES.values()),
}
"""Some of what the built-in model knows."""

WISHES = tuple(wish for wishes in KINDS.values() for wish in wishes)
BUILT_IN_WISHES = tuple(wish for wishes in BUILT_IN_KINDS.values() for wish in wishes)


def asked_with(trigger: str, wish: str) -> str:
    """The prompt of a wish; one that has the trigger is a whole prompt."""
    return wish if trigger in wish else f"{trigger}, {wish}"
