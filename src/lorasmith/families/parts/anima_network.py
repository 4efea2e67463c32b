"""Anima's network: diffusers' Cosmos transformer with the adapter that makes its text conditioning.

In diffusers these are two parts of a pipeline, `transformer` and `text_conditioner`; original files hold both. Here
they are one module, because both are trained with a picture's loss. Imported when a model is loaded, as diffusers is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from torch import Tensor
from torch.nn import functional as F


class AnimaNetwork(CosmosTransformer3DModel):  # type: ignore[misc]
    """The transformer, with the adapter as `text_conditioner`.

    The mask of padding, zeros for whole pictures, is a channel of the latents here: diffusers scales it with
    torchvision. So `config.in_channels` is one more than the latents have.
    """

    def __init__(
        self, *, text_conditioner: Mapping[str, Any] | None = None, in_channels: int = 16, **settings: Any
    ) -> None:
        super().__init__(**{**settings, "in_channels": in_channels + 1, "concat_padding_mask": False})
        self.text_conditioner = AnimaTextConditioner(**_known(text_conditioner or {}, AnimaTextConditioner))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AnimaNetwork:
        """The network for configurations of diffusers: the transformer's, with the adapter's as an entry."""
        return cls(**_known(config, CosmosTransformer3DModel), text_conditioner=config["text_conditioner"])

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        states: Tensor,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity, of the shape of `latents`.

        latents: (batch, channels, frames, height, width); time: (batch,) noise levels; states: (batch, tokens, width)
        of the text encoder; the conditioning itself without `ids`; ids: (batch, T5 tokens), −1 for none, which only the
        end of a row may be; weights: (batch, T5 tokens) factors of the rows that the adapter makes of `ids`; None for
        1; mask: bool (batch, tokens), False for states to ignore; None where no row of `states` or `ids` is filled up.
        """
        context, attended = states, mask
        if ids is not None:
            context, attended = self._conditioning(states, ids, weights, mask)
        padding = torch.zeros_like(latents[:, :1])
        prediction: Tensor = super().forward(
            torch.cat((latents, padding), dim=1), time, context, attention_mask=attended, return_dict=False
        )[0]
        return prediction

    def _conditioning(
        self, states: Tensor, ids: Tensor, weights: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the transformer attends to, at least 512 rows, and which of these rows exist; None for all."""
        there = None if mask is None else ids >= 0
        rows: Tensor = self.text_conditioner(states, ids.clamp(min=0), there, mask)
        if weights is not None:
            rows = rows * F.pad(weights, (0, rows.shape[1] - weights.shape[1]), value=1.0).unsqueeze(-1)
        least = int(self.text_conditioner.config.min_sequence_length)
        if there is None or rows.shape[1] <= least:
            return rows, None
        # A shorter prompt beside one of more rows than all have has zeros up to that number, and no more.
        lengths = there.sum(dim=1, keepdim=True).clamp(min=least)
        return rows, torch.arange(rows.shape[1], device=rows.device) < lengths


def _known(config: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The settings of a configuration that a class takes."""
    names = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    return {name: value for name, value in config.items() if name in names}
