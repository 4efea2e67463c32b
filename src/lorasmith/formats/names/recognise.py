"""Which model family a LoRA was made for, as far as its names and shapes give it away without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorasmith.adapters.algorithms import algorithms
from lorasmith.formats.names.prefixes import FLAT
from lorasmith.formats.names.spelling import grouped

__all__ = ["block_of", "guessed_family", "kind_of"]


def guessed_family(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What people call the family, or None when nothing gives it away.

    Args:
        shapes: shape of each tensor by key.
    """
    inputs = {base.replace(".", "_"): width for base, width in _input_widths(shapes).items()}
    for pattern, widths in _FAMILIES:
        matching = [width for base, width in inputs.items() if re.search(pattern, base)]
        if matching:
            return next((title for width, title in widths.items() if width in matching), widths[None])
    return None


def block_of(base: str) -> str:
    """The outermost numbered block that a base lies in, such as `down_blocks.1`, or an empty string."""
    match = _BLOCK.search(base)
    if match is None:
        return ""
    return ".".join(part for part in match.groups() if part)


def kind_of(base: str) -> str:
    """Which layer of its block a base is, such as `attn1_to_q`, or its name where it lies in none."""
    return _UP_TO_KIND.sub("", base.replace(".", "_"))


_START = rf"^({FLAT})?"
_CROSS_ATTENTION = r"((down|up|input|output)_blocks_\d|(mid|middle)_block_).*attn2_(processor_)?to_[kv]$"

# Tested in this order on bases with underscores for dots; the second entry gives titles by input width of a matching
# module, and under None the title for any other width.
_FAMILIES: tuple[tuple[str, dict[int | None, str]], ...] = (
    (r"(^|_)joint_blocks_\d", {None: "Stable Diffusion 3"}),
    (r"double_stream_modulation|single_transformer_blocks_\d+_attn_to_qkv_mlp_proj", {None: "Flux.2"}),
    (r"(^|_)(double|single)_blocks_\d|single_transformer_blocks_\d", {6144: "Flux.2", None: "Flux.1"}),
    (r"(^|_)transformer_blocks_\d+_(img_mlp|txt_mlp|img_mod|txt_mod)", {None: "Qwen-Image"}),
    # Flux.1 has 19 blocks of this kind, Qwen-Image 60.
    (r"(^|_)transformer_blocks_(19|[2-5]\d)_attn_add_q_proj", {3072: "Qwen-Image", None: "Stable Diffusion 3"}),
    (r"(^|_)transformer_blocks_\d+_(ff_context|attn_add_q_proj)", {3072: "Flux.1", None: "Stable Diffusion 3"}),
    (_START + r"layers_\d+_(attention|attn|feed_forward)_", {3840: "Z-Image", 2304: "Lumina 2", None: "Lumina"}),
    (_START + r"blocks_\d+_(self_attn|cross_attn|attn1|ffn)_", {None: "Wan"}),
    (
        _CROSS_ATTENTION,
        {
            768: "Stable Diffusion 1.x",
            1024: "Stable Diffusion 2.x",
            2048: "Stable Diffusion XL",
            None: "Stable Diffusion",
        },
    ),
    (r"^(lora_te2|text_encoder_2)_text_model_", {None: "Stable Diffusion XL"}),
    (r"^text_encoder_2_encoder_block_", {None: "Flux.1"}),
    (r"(down|up|input|output)_blocks_\d|(mid|middle)_block_", {None: "Stable Diffusion"}),
)

_UP_TO_KIND = re.compile(rf"^.*(blocks|block|layers|attentions|resnets|samplers)_\d+_(\d+_)?|^({FLAT})")
_BLOCK = re.compile(
    r"((?:down|up|input|output|double|single|joint)_blocks|(?:single_)?transformer_blocks|layers|blocks)[._](\d+)"
    r"|(mid_block|middle_block)"
)


def _input_widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Input width of each module by base, 0 where no tensor shows it."""
    axes = {role: axis for _, form in algorithms() for role, axis in form.input_axes.items()}
    widths = {}
    for base, keys in grouped(shapes).items():
        role = next((role for role in axes if role in keys), "")
        shape = shapes[keys[role]] if role else ()
        widths[base] = shape[axes[role]] if len(shape) > 1 else 0
    return widths
