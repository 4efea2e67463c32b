"""The chat in which Qwen-Image and Krea 2 put a prompt: a system's turn, a user's turn, and the start of an answer.

The language model reads the whole chat; the denoiser sees what comes after the words that open the user's turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SYSTEM_TOKENS = 34
"""Length of `SYSTEM`."""
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
_TURN = "<|im_start|>"


def chat_of(text: str) -> str:
    """The chat of a prompt; one that begins with a turn is a whole chat already, as in ComfyUI."""
    return text if text.startswith(_TURN) else f"{SYSTEM}{text}{ANSWER}"


def seen_from(tokenizer: Any, ids: Sequence[int]) -> int:
    """Index of the first token that the denoiser sees: after the opening of the second turn, if that is the user's."""
    turn, *user = tokenizer(f"{_TURN}user\n").input_ids
    starts = [index for index, token in enumerate(ids) if token == turn][:2]
    start = starts[-1] if starts else 0
    opened = start + 1 + len(user)
    return opened if len(ids) > opened and list(ids[start + 1 : opened]) == user else start
