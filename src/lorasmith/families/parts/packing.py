"""Latents as tokens: 2×2 pixels of all channels, channels first, as Flux.1 and the families after it pack them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["packed_latents", "unpacked_latents"]


def packed_latents(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) → (batch, height/2 · width/2, 4 · channels)."""
    batch, channels, height, width = latents.shape
    tokens = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpacked_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed_latents`.

    Args:
        tokens: (batch, height/2 · width/2, 4 · channels).
        height, width: of the latents.
    """
    batch, _, features = tokens.shape
    latents = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, features // 4, height, width)
