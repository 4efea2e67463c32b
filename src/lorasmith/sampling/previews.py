"""Pictures of a LoRA that is still in training, drawn from its saved file the way users will draw them.

Prompts are encoded once, before training. A preview then loads the file onto the same base, samples from the same noise
as every other preview, and needs the autoencoder only to decode. Loading a LoRA is training's business, so it is given
as a function; writing pictures down is `report.preview_folder`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from lorasmith.core.errors import OptionError
from lorasmith.families.base import Conditioning
from lorasmith.families.model import Denoiser, TextEncoder
from lorasmith.sampling.generate import Sampling, pictures

__all__ = ["Previewer", "parse_prompts", "parse_strengths"]

_MOST_PROMPTS = 64
_STRONGEST = 10.0


class Previewer:
    """Draws the same prompts from the same noise, with and without a LoRA.

    Args:
        denoiser: what the LoRA is trained on, LoRAs that it carries included.
        prompts: one for each picture.
        load: the denoiser with a saved LoRA on top at a strength.
        strengths: those that will be asked for, besides 0.
        encoder: the text encoder at a strength of the LoRA, for LoRAs that carry one along; the model's own if None.
        sampling: how; a guidance scale left out is the model's.
        device: where, as for `generate`.
        cancelled: asked between evaluations of the network.

    Raises:
        ModelError: the model lacks a text encoder or an autoencoder.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prompts: Sequence[str],
        *,
        load: Callable[[Path, float], Denoiser],
        strengths: Sequence[float] = (1.0,),
        encoder: Callable[[float], TextEncoder] | None = None,
        sampling: Sampling,
        device: torch.device | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        base = denoiser.base
        base.family.check_parts(base.components, text=True, images=True)
        self.prompts = tuple(prompts)
        self.sampling = sampling if sampling.cfg is not None else replace(sampling, cfg=base.defaults.guidance)
        self._denoiser, self._load = denoiser, load
        self._device, self._cancelled = device, cancelled
        self._encoded = _encoded(self.prompts, (0.0, *strengths), encoder or _always(base.text_encoder), device)
        self._base: list[Image.Image] | None = None

    def draw(self, lora: Path | None, strength: float = 1.0) -> list[Image.Image]:
        """A picture of each prompt. Nothing of the model or of the global random state is changed by it.

        Args:
            lora: the saved file; None for the model without it.
            strength: of the LoRA, one of those announced; 0 is the model without it, which is drawn only once.

        Raises:
            LorasmithError: the file cannot be read or does not fit; `SamplingCancelledError` when `cancelled` said so.
        """
        if lora is None or strength == 0:
            if self._base is None:
                self._base = self._drawn(self._denoiser, 0.0)
            return self._base
        return self._drawn(self._load(lora, strength), strength)

    def _drawn(self, denoiser: Denoiser, strength: float) -> list[Image.Image]:
        positives, negative = self._encoded[strength]
        sampling, device = self.sampling, self._device
        return pictures(denoiser, positives, negative, sampling, device=device, cancelled=self._cancelled)


def parse_prompts(text: str | None) -> tuple[str, ...]:
    """The prompts in a text that separates them by | or line breaks; empty ones are dropped.

    Raises:
        OptionError: there are more than 64.
    """
    prompts = tuple(filter(None, (part.strip() for part in re.split(r"[|\n\r]", text or ""))))
    if len(prompts) > _MOST_PROMPTS:
        raise OptionError(f"previews must be at most {_MOST_PROMPTS} prompts, got {len(prompts)}; leave some out")
    return prompts


def parse_strengths(text: str) -> tuple[float, ...]:
    """The strengths in a text such as `0.5,1`, rising, each once; 0 is dropped, since the base is always shown.

    Raises:
        OptionError: something is no number, or beyond ±10.
    """
    strengths = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            strength = float(part)
        except ValueError:
            strength = math.nan
        if not abs(strength) <= _STRONGEST:  # NaN is not
            raise OptionError(
                f"preview_strengths must be numbers between -{_STRONGEST:g} and {_STRONGEST:g}, got {part!r}; "
                "write them like 0.5,1"
            )
        strengths.add(strength)
    return tuple(sorted(strengths - {0.0}))


def _encoded(
    prompts: Sequence[str],
    strengths: Sequence[float],
    encoder: Callable[[float], TextEncoder],
    device: torch.device | None,
) -> dict[float, tuple[list[Conditioning], Conditioning]]:
    """Conditionings of the prompts and of the empty negative prompt by strength; equal encoders are asked once."""
    encoded: dict[float, tuple[list[Conditioning], Conditioning]] = {}
    known: list[tuple[TextEncoder, float]] = []
    for strength in strengths:
        handle = encoder(strength)
        same = next((before for one, before in known if one is handle), None)
        if same is None:
            known.append((handle, strength))
            with handle.active(device):
                encoded[strength] = [handle.encode(prompt) for prompt in prompts], handle.encode("")
        else:
            encoded[strength] = encoded[same]
    return encoded


def _always(encoder: TextEncoder) -> Callable[[float], TextEncoder]:
    return lambda strength: encoder
