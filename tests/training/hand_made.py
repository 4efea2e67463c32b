"""A denoiser of plain torch modules, which nobody's library knows.

A step of it takes a ninth of one of the built-in model, whose captions it reads if it has their width, and whose
names of attention layers it has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS, WIDTH = 4, 32


class Attention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(context, WIDTH, bias=False)
        self.to_v, self.to_out = nn.Linear(context, WIDTH, bias=False), nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = None if mask is None else mask[:, None]
        y: Tensor = self.to_out[0](
            F.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context), mask)
        )
        return y


class Block(nn.Module):
    """Attention to itself and to the text, then a feed-forward layer."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attn1, self.attn2 = Attention(WIDTH), Attention(context)
        self.inner, self.outer = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norm2(x), context, mask)
        y: Tensor = x + self.outer(F.silu(self.inner(self.norm3(x))))
        return y


class HandMade(nn.Module):
    """Predicts from latents (batch, 4, height, width), and texts of a width; the same weights each time."""

    def __init__(self, context: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enter = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
            self.leave = nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)
            self.time, self.blocks = nn.Linear(1, WIDTH), nn.ModuleList(Block(context) for _ in range(2))

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,  # which it does not read
        mask: Tensor | None = None,
    ) -> Tensor:
        x = self.enter(latents)
        tokens = x.flatten(2).transpose(1, 2) + self.time(time.log1p().to(x.dtype)[:, None])[:, None]
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        prediction: Tensor = self.leave(tokens.transpose(1, 2).reshape(x.shape))
        return prediction
