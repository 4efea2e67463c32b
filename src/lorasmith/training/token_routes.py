"""The tokens that a draw's blocks see with `tread_rate`: a function of the seed, the draw and the picture's size.

All predictions of a step have the same, those of the frozen model included; validation and previews have all tokens.
How a prediction follows a route is in `families.token_routing`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.core.random import keyed_generator
from lorasmith.data.dataset import Sample
from lorasmith.families.conditionings import FIRST_FRAME
from lorasmith.families.forms import Routing
from lorasmith.families.token_routing import Route
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.trainable import Trainable


@dataclass(frozen=True)
class TokenRoutes:
    """The routes of a run, through the blocks `first` to `last`."""

    routing: Routing
    rate: float
    first: int
    last: int
    seed: int

    @classmethod
    def of(cls, model: Trainable, config: ResolvedConfig) -> Self | None:
        """Those of the settings; None for none. Raises OptionError if they do not fit the model."""
        if not config.tread_rate:
            return None
        if model.routing is None:
            raise OptionError(
                f"tread_rate is for the transformers of lorasmith's model families, got {model.title}; leave it out"
            )
        count = len(model.routing.listed(model.module))
        first, last = (block + count if block < 0 else block for block in (config.tread_first, config.tread_last))
        if not 0 <= first <= last < count:
            raise OptionError(
                f"tread_first and tread_last must be two of the {count} blocks of {model.title} in order, got "
                f"{config.tread_first} and {config.tread_last}; choose from 0 to {count - 1}, or from -{count} to -1"
            )
        return cls(model.routing, config.tread_rate, first, last, config.seed)

    def route(self, samples: Sequence[Sample], draws: Sequence[int]) -> Route | None:
        """The route of a batch, samples of one size; None where the share is less than a token.

        Tokens inside of masks, and of frames that are given, are dropped after all others.
        """
        grid = self.routing.grid(samples[0].latents.shape)
        tokens = math.prod(grid)
        kept = tokens - int(self.rate * tokens)
        if kept == tokens:
            return None
        rows = []
        for sample, draw in zip(samples, draws, strict=True):
            order = torch.randperm(tokens, generator=keyed_generator(self.seed, "route", draw))
            favoured = _favoured(sample, grid, self.routing.patch).flatten()
            order = order[favoured[order].argsort(descending=True, stable=True)]
            rows.append(order[:kept].sort().values)
        return Route(torch.stack(rows), tokens, self.first, self.last)


def _favoured(sample: Sample, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Bool, of the shape of `grid`: whether a token is inside of the sample's mask, or given."""
    found = torch.zeros(grid, dtype=torch.bool)
    if (places := sample.places) is not None:
        inside = (places > places.max() / 2).float()[None, None]
        found |= torch.nn.functional.max_pool2d(inside, patch[1:])[0] > 0
    if (first_frame := sample.conditioning.tensors.get(FIRST_FRAME)) is not None:
        found[: first_frame.shape[2] // patch[0]] = True
    return found
