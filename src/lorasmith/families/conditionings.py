"""Conditionings: what a denoiser is given besides noisy latents and time, and how several are one batch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.placement import sent
from lorasmith.core.printable import described, printable

_CONTROL = "control_"
FIRST_FRAME = "first_frame"
"""Name of the tensor of a conditioning that is the first of a clip's latents, or the first few."""

CLIP_VISION = "clip_vision"
"""Name of the tensor of a conditioning that is made by an image encoder."""

BY_OFFSET, BY_INDEX, BY_UXO, AT_ZERO = "controls_by_offset", "controls_by_index", "controls_by_uxo", "controls_at_zero"
CONTROL_METHODS = {"offset": BY_OFFSET, "index": BY_INDEX, "uxo/uno": BY_UXO, "index_timestep_zero": AT_ZERO}
"""ComfyUI's methods of placing controls → tensors of a conditioning, of any value, that choose them: beside or below
each other, each with an index of its own, beyond each other's corners, and by index with time 0."""

_OF_PICTURES = re.compile(rf"{_CONTROL}\d+|known|{FIRST_FRAME}|{CLIP_VISION}")


@dataclass(frozen=True)
class Conditioning:
    """A denoiser's inputs besides noisy latents and time.

    Attributes:
        tensors: by name, each with the batch as its first dimension, 1 for a single prompt. `context` (batch, tokens,
            width) is there in each family; `pooled` (batch, width), `guidance` (batch,) and others where the family
            has them. With `no_guidance`, of any value, a network with an embedding of guidance leaves it out.
            `control_0`, `control_1`, ... (batch, channels, height, width) are pictures to edit or refer to, scaled like
            the latents; sizes of their own are never padded. Made of the picture or clip itself
            (`Family.picture_inputs`): `known` (batch, channels, [frames,] height, width) are channels beside the noisy
            latents, `first_frame` (batch, channels, 1, height, width) is a clip's first frame, which gets no noise,
            `clip_vision` (batch, tokens, width) are states of an image encoder.
        text: the prompt it came from, for reports and metadata; None when unknown.
        mask: bool (batch, tokens), True for tokens of the context that are attended to; None for all of them.
        span: the part of sampling that it applies to, from 0 at the start to 1 at the end; training ignores it.
        texts: the prompts of a batch, which a network with text encoders in training encodes again; else empty.
    """

    tensors: Mapping[str, Tensor]
    text: str | None = None
    mask: Tensor | None = None
    span: tuple[float, float] = (0.0, 1.0)
    texts: tuple[str, ...] = ()
    _moved: tuple[Tensor, Tensor] | None = field(default=None, compare=False)  # a mask, and where it was copied from

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, Mapping):
            raise DataError(
                f"tensors of a conditioning must be a mapping by name, got {described(self.tensors)}; give "
                '{"context": tensor}'
            )

    def __repr__(self) -> str:
        facts = [f"{name} {'×'.join(map(str, tensor.shape))}" for name, tensor in self.tensors.items()]
        caption = [] if self.text is None else [repr(printable(self.text, limit=60))]
        return f"Conditioning({', '.join([*caption, *facts, *(['masked'] if self.mask is not None else [])])})"

    @property
    def controls(self) -> tuple[Tensor, ...]:
        """The controls, in order."""
        found = list[Tensor]()
        while (control := self.tensors.get(f"{_CONTROL}{len(found)}")) is not None:
            found.append(control)
        return tuple(found)

    def with_controls(self, controls: Sequence[Tensor]) -> Conditioning:
        """The conditioning with these controls in place of its own."""
        others = {name: tensor for name, tensor in self.pictures.items() if not name.startswith(_CONTROL)}
        return self.with_pictures({**others, **named_controls(controls)})

    @property
    def pictures(self) -> Mapping[str, Tensor]:
        """The tensors that are made of pictures."""
        return {name: tensor for name, tensor in self.tensors.items() if _OF_PICTURES.fullmatch(name)}

    def with_pictures(self, tensors: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning with these tensors in place of those that are made of pictures."""
        if not tensors and not self.pictures:
            return self
        others = {name: tensor for name, tensor in self.tensors.items() if not _OF_PICTURES.fullmatch(name)}
        return replace(self, tensors={**others, **tensors})

    beside, with_beside = pictures, with_pictures  # their names in earlier versions

    def with_text(self, other: Conditioning) -> Conditioning:
        """The conditioning with another text's encoding, whose other inputs (sizes, controls, ...) are kept."""
        return replace(other, tensors={**self.tensors, **other.tensors}, span=self.span)

    def rows(self) -> list[Conditioning]:
        """The conditioning of each of `texts`, with the padding of the batch."""
        return [
            Conditioning(
                {name: tensor[row : row + 1] for name, tensor in self.tensors.items()},
                text,
                None if self.mask is None else self.mask[row : row + 1],
            )
            for row, text in enumerate(self.texts)
        ]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of attended tokens of the context, for each of the batch."""
        context, mask = self.tensors["context"], self.mask_on_cpu
        return (context.shape[1],) * len(context) if mask is None else tuple(mask.sum(1).tolist())

    @property
    def mask_on_cpu(self) -> Tensor | None:
        """The mask on the CPU, for which nobody waits if `to` has copied it to the device."""
        if self._moved is not None and self._moved[0] is self.mask:
            return self._moved[1]
        return None if self.mask is None else self.mask.cpu()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """A copy on `device` with floating-point tensors in `dtype`."""
        device = torch.device(device)
        moved = {
            key: sent(tensor, device, dtype if tensor.is_floating_point() else tensor.dtype)
            for key, tensor in self.tensors.items()
        }
        if self.mask is None:
            return replace(self, tensors=moved)
        mask = sent(self.mask, device, self.mask.dtype)
        known = (mask, self.mask) if self.mask.device.type == "cpu" else self._moved
        return replace(self, tensors=moved, mask=mask, _moved=known)


def named_controls(controls: Sequence[Tensor]) -> dict[str, Tensor]:
    """Controls by the names that they have in a conditioning."""
    return {f"{_CONTROL}{index}": control for index, control in enumerate(controls)}


class PictureSize(NamedTuple):
    """How a training picture got its size; (height, width) or (top, left) in pixels."""

    original: tuple[int, int]  # of the image file, upright
    crop: tuple[int, int]  # what was cut off above and to the left after scaling
    target: tuple[int, int]  # of what is trained on


def collate(conditionings: Sequence[Conditioning], *, repeatable: bool) -> Conditioning:
    """One batch of several prompts' conditionings, in order. Raises DataError if they carry different tensors.

    `repeatable` says how contexts of different length share the batch. True repeats each to their least common
    multiple, which leaves unmasked cross-attention unchanged: softmax over k copies of the keys gives each copy 1/k of
    the weight. False pads with zeros and masks them.
    """
    keys = set(conditionings[0].tensors)
    if any(set(conditioning.tensors) != keys for conditioning in conditionings):
        raise DataError(
            "conditionings in one batch must carry the same tensors, got "
            + " and ".join(sorted({", ".join(sorted(conditioning.tensors)) for conditioning in conditionings}))
            + "; encode all captions with the same text encoder"
        )
    batch = {key: [conditioning.tensors[key] for conditioning in conditionings] for key in keys}
    masks = [conditioning.mask for conditioning in conditionings]
    contexts = batch.get("context", [])
    lengths = [context.shape[1] for context in contexts]
    if len(set(lengths)) > 1 and repeatable:
        tokens = math.lcm(*lengths)
        batch["context"] = [_times(context, tokens // context.shape[1]) for context in contexts]
        masks = [mask if mask is None else _times(mask, tokens // mask.shape[1]) for mask in masks]
    elif len(set(lengths)) > 1:
        batch["context"] = [_filled(context, max(lengths)) for context in contexts]
        masks = [_filled(_known(mask, context), max(lengths)) for mask, context in zip(masks, contexts, strict=True)]
    mask = None
    if any(mask is not None for mask in masks):
        mask = torch.cat([_known(*pair) for pair in zip(masks, batch["context"], strict=True)])
    return Conditioning({key: torch.cat(parts) for key, parts in batch.items()}, mask=mask)


def check_even(latents: Tensor, title: str, *, pixels: int = 16) -> None:
    """Raise DataError for latents (..., height, width) that cannot be cut into patches of 2×2, `pixels` wide each."""
    height, width = latents.shape[-2:]
    if height % 2 or width % 2:
        raise DataError(
            f"{title} packs latents 2×2, so their sides must be even, got {height}×{width}; "
            f"use picture sizes that are multiples of {pixels}"
        )


def _times(tensor: Tensor, count: int) -> Tensor:
    """(batch, tokens, ...) with all tokens `count` times."""
    return tensor.repeat(1, count, *(1,) * (tensor.ndim - 2))


def _filled(tensor: Tensor, tokens: int) -> Tensor:
    """(batch, tokens, ...) padded with zeros."""
    rest = tensor.new_zeros(len(tensor), tokens - tensor.shape[1], *tensor.shape[2:])
    return torch.cat((tensor, rest), dim=1)


def _known(mask: Tensor | None, context: Tensor) -> Tensor:
    return context.new_ones(context.shape[:2], dtype=torch.bool) if mask is None else mask
