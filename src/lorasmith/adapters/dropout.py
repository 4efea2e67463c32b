"""Dropout on the rank and on whole modules of LoRAs, as kohya's scripts have them, with keyed randomness.

With probability `rank` each inner dimension of a layer is left out for a sample, and the others are scaled up by
1 / (1 − rank); with probability `module` a layer is left out altogether, and nothing is scaled. The masks are a
function of seed, draw and module path. So a batch of four has the masks of four batches of one, and blocks that are
recomputed in the backward pass have those of the forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.adapters.adapter import Adapter
from lorasmith.adapters.lora import LowRank
from lorasmith.core.random import keyed_generator

__all__ = ["Dropout"]


class Dropout:
    """Makes the masks of a set of adapters and sets them.

    Args:
        adapters: by module path. Those without a low-rank product inside are not masked.
        rank, module: probabilities in [0, 1).
        seed: key of the masks.
    """

    def __init__(self, adapters: Mapping[str, Adapter], *, rank: float, module: float, seed: int) -> None:
        self.adapters = {
            path: part
            for path, adapter in (adapters.items() if rank or module else ())
            for part in adapter.modules()  # a DoRA has it inside; its magnitude is never dropped
            if isinstance(part, LowRank)
        }
        self._rank = rank
        self._module = module
        self._seed = seed

    def masks(self, draws: Sequence[int]) -> Tensor | None:
        """Factors of all inner dimensions, layer after layer, for each draw: (draws, sum of ranks); None for none."""
        if not self.adapters:
            return None
        return torch.stack([torch.cat([self._mask(path, draw) for path in self.adapters]) for draw in draws])

    @contextlib.contextmanager
    def masks_applied(self, masks: Tensor | None) -> Iterator[None]:
        """Run with masks that `masks` made, on the device and in the dtype of the adapters."""
        if masks is None:
            yield
            return
        parts = torch.split(masks, [adapter.rank for adapter in self.adapters.values()], dim=1)
        try:
            for adapter, part in zip(self.adapters.values(), parts, strict=True):
                adapter.mask = part
            yield
        finally:
            for adapter in self.adapters.values():
                adapter.mask = None

    def _mask(self, path: str, draw: int) -> Tensor:
        rank = self.adapters[path].rank
        uniform = torch.rand(rank + 1, generator=keyed_generator(self._seed, "dropout", f"{draw}/{path}"))
        kept = (uniform[1:] >= self._rank) & (uniform[0] >= self._module)
        return kept / (1 - self._rank)
