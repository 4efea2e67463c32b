"""Previews of a LoRA in training, drawn from its saved file as users will draw pictures.

Prompts are encoded once, before training. A preview loads the file onto the same base model, samples from the same
noise as every other preview, and decodes. Files are written by `report.contact_sheet`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.forms import Sight
from lorasmith.families.model import Denoiser, TextEncoder
from lorasmith.report.pictures import PictureOrClip
from lorasmith.sampling.generate import Experts, Sampling, clips
from lorasmith.sampling.sketches import Sketcher

Partner = Callable[[Denoiser, float], Experts]
"""From one of two experts, and the strength of the LoRA on it, to both; called for each row of pictures."""

_MOST_PROMPTS = 64
_STRONGEST = 10.0


class Previewer:
    """Draws the same prompts from the same noise, with and without a LoRA.

    `denoiser` has the run's own LoRAs, and `load` (path, strength) returns it with another on top. `strengths` are
    those that will be drawn, besides 0; `pictures` is `Conditioning.pictures` of each prompt, for models that draw from
    pictures, and `seen` the pixels of these that the text encoder sees; `encoder` maps a strength to the text encoder,
    for LoRAs with layers for it; `trained_encoder` (path, strength) to that with the layers of a drawn LoRA, where text
    encoders are trained. `partner` is for models with two experts, `sketcher` sees what is drawn. Raises ModelError if
    the model lacks a text encoder or an autoencoder.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prompts: Sequence[str],
        *,
        load: Callable[[Path, float], Denoiser],
        strengths: Sequence[float] = (1.0,),
        pictures: Sequence[Mapping[str, Tensor]] = (),
        seen: Sequence[Sequence[Tensor]] = (),
        encoder: Callable[[float], TextEncoder] | None = None,
        trained_encoder: Callable[[Path, float], TextEncoder] | None = None,
        sampling: Sampling,
        device: torch.device | None = None,
        cancelled: Callable[[], bool] | None = None,
        partner: Partner | None = None,
        sketcher: Sketcher | None = None,
    ) -> None:
        base = denoiser.base
        base.family.check_parts(base.components, text=True, images=True)
        self.prompts = tuple(prompts)
        self.sampling = sampling if sampling.cfg is not None else replace(sampling, cfg=base.defaults.guidance)
        self._denoiser, self._load, self._partner = denoiser, load, partner
        self._device, self._cancelled, self._sketcher = device, cancelled, sketcher
        self._pictures = pictures or ({},) * len(self.prompts)
        self._trained_encoder = trained_encoder
        ahead = () if trained_encoder else strengths
        self._shown = [*zip(self.prompts, seen or ((),) * len(self.prompts), strict=True)]
        self._encoded = self._encode((0.0, *ahead), encoder or _always(base.text_encoder))
        self._base: Sequence[PictureOrClip] | None = None

    def draw(self, lora: Path | None, strength: float = 1.0) -> Sequence[PictureOrClip]:
        """Draw a picture or a clip of each prompt, without side effects on the model or the global random state.

        Without a file or at strength 0 it is the model without the LoRA, drawn only once. Raises LorasmithError if the
        file does not fit, and SamplingCancelledError.
        """
        if lora is None or strength == 0:
            if self._base is None:
                self._base = self._drawn(self._denoiser, 0.0)
            return self._base
        if self._trained_encoder is not None:
            trained = self._trained_encoder(lora, strength)
            self._encoded |= self._encode((strength,), _always(trained))
        return self._drawn(self._load(lora, strength), strength)

    def _encode(
        self, strengths: Sequence[float], encoder: Callable[[float], TextEncoder]
    ) -> dict[float, tuple[list[Conditioning], list[Conditioning]]]:
        return _encoded(self._shown, strengths, encoder, self._device, self._denoiser.base.sight)

    def _drawn(self, denoiser: Denoiser, strength: float) -> Sequence[PictureOrClip]:
        encoded, negatives = self._encoded[strength]
        positives = [
            conditioning.with_pictures(pictures) for conditioning, pictures in zip(encoded, self._pictures, strict=True)
        ]
        drawing = denoiser if self._partner is None else self._partner(denoiser, strength)
        drawn = clips(
            drawing,
            positives,
            negatives,
            self.sampling,
            device=self._device,
            sketcher=self._sketcher,
            cancelled=self._cancelled,
        )
        return [clip if len(clip.frames) > 1 else clip.frames[0] for clip in drawn]


def parse_prompts(text: str | None) -> tuple[str, ...]:
    """The prompts in a text, separated by | or line breaks, without empty ones. Raises OptionError if more than 64."""
    prompts = tuple(filter(None, (part.strip() for part in re.split(r"[|\n\r]", text or ""))))
    if len(prompts) > _MOST_PROMPTS:
        raise OptionError(f"previews must be at most {_MOST_PROMPTS} prompts, got {len(prompts)}; leave some out")
    return prompts


def parse_strengths(text: str) -> tuple[float, ...]:
    """The distinct strengths in a text such as `0.5,1`, ascending, without 0, as the base is always drawn.

    Raises OptionError if one is not a number, or beyond ±10.
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
    prompts: Sequence[tuple[str, Sequence[Tensor]]],
    strengths: Sequence[float],
    encoder: Callable[[float], TextEncoder],
    device: torch.device | None,
    sight: Sight | None,
) -> dict[float, tuple[list[Conditioning], list[Conditioning]]]:
    """Conditionings of the prompts, each with what is seen, and of their empty negative prompts by strength.

    Equal encoders run once.
    """
    encoded: dict[float, tuple[list[Conditioning], list[Conditioning]]] = {}
    different = {id(seen): seen for _, seen in prompts}
    known: list[tuple[TextEncoder, float]] = []
    for strength in strengths:
        handle = encoder(strength)
        same = next((before for encoder_handle, before in known if encoder_handle is handle), None)
        if same is None:
            known.append((handle, strength))
            with handle.active(device, sees=any(different.values())):
                positives = [handle.encode(text, seen, sight=sight) for text, seen in prompts]
                away = {key: handle.encode("", seen, sight=sight) for key, seen in different.items()}
            encoded[strength] = positives, [away[id(seen)] for _, seen in prompts]
        else:
            encoded[strength] = encoded[same]
    return encoded


def _always(encoder: TextEncoder) -> Callable[[float], TextEncoder]:
    return lambda strength: encoder
