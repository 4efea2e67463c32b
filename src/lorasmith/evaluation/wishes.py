"""What is asked for beside a trigger, to see whether a LoRA still follows prompts."""

from __future__ import annotations

from collections.abc import Mapping

KINDS: Mapping[str, tuple[str, ...]] = {
    "Background": ("on a plain white background",),
    "Place": ("on a beach", "in a forest", "in the snow", "in a city street at night"),
    "Light": ("at sunset",),
    "Style": ("as a pencil drawing", "as an oil painting"),
}

BUILT_IN_KINDS: Mapping[str, tuple[str, ...]] = {
    "Background": (
        "on a red background",
        "on a purple background",
        "on an orange background",
        "on a light blue background",
    ),
    "Style": ("noto style", "twemoji style", "flat style", "soft shaded style"),
}
"""Those that the built-in model knows."""

WISHES = tuple(wish for wishes in KINDS.values() for wish in wishes)
BUILT_IN_WISHES = tuple(wish for wishes in BUILT_IN_KINDS.values() for wish in wishes)


def asked_with(trigger: str, wish: str) -> str:
    """The prompt of a wish; one that has the trigger is a whole prompt."""
    return wish if trigger in wish else f"{trigger}, {wish}"
