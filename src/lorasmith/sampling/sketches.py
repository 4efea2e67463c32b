"""Small pictures of what is still being drawn: latents by a linear map to colours, which decoded pictures teach.

No table of a family's colours is needed, and nothing is decoded for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_EVERY_S = 0.5  # between two sketches


class Sketcher:
    """Shows sketches of the size of the latents, once a picture was decoded."""

    def __init__(self, show: Callable[[Image.Image], object]) -> None:
        self._show = show
        self._sums: tuple[Tensor, Tensor] | None = None  # of products of channels, and of channels with colours
        self._colours: Tensor | None = None  # (channels + 1, 3)
        self._last = 0.0

    def see(self, latents: Tensor) -> None:
        """Sketch denoised latents (1, channels, [frames,] height, width), of clips the first frame."""
        now = time.monotonic()
        if self._colours is None or now - self._last < _EVERY_S:
            return
        self._last = now
        pixels = (_rows(latents) @ self._colours).clamp(0, 1).mul(255).round().to(torch.uint8)
        self._show(Image.fromarray(pixels.reshape(*latents.shape[-2:], 3).numpy()))

    def learn(self, latents: Tensor, picture: Image.Image) -> None:
        """Fit the map also to the picture that was decoded from latents."""
        small = picture.convert("RGB").resize((latents.shape[-1], latents.shape[-2]), Image.Resampling.BOX)
        wanted, rows = torch.from_numpy(np.asarray(small, np.float64)).reshape(-1, 3) / 255, _rows(latents)
        channels, colours = self._sums or (0.0, 0.0)
        self._sums = channels + rows.T @ rows, colours + rows.T @ wanted
        self._colours = torch.linalg.pinv(self._sums[0], hermitian=True) @ self._sums[1]


def _rows(latents: Tensor) -> Tensor:
    """The channels of each place, and a one, (places, channels + 1)."""
    first = latents[0] if latents.ndim == 4 else latents[0, :, 0]
    flat = first.detach().cpu().double().flatten(1).T
    return torch.cat((flat, flat.new_ones(len(flat), 1)), dim=1)
