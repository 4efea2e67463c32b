"""Train a denoiser of plain torch modules, which nobody's library knows.

`test_torch_only` runs `main` in a process that cannot import diffusers. It prints what it found, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.adapters.frozen_layer import is_targetable

CHANNELS, WIDTH, CONTEXT = 4, 32, 24


class Block(nn.Module):
    """Attention to the text, then a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_q = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.to_k, self.to_v = nn.Linear(CONTEXT, WIDTH), nn.Linear(CONTEXT, WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context))
        y: Tensor = x + self.outer(nn.functional.silu(self.inner(self.norm(x))))
        return y


class HandMade(nn.Module):
    """A denoiser that nobody's library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)
        self.time, self.blocks = nn.Linear(1, WIDTH), nn.ModuleList(Block() for _ in range(2))

    def forward(self, latents: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.enter(latents)
        tokens = x.flatten(2).transpose(1, 2) + self.time(time.to(x.dtype)[:, None])[:, None]
        for block in self.blocks:
            tokens = block(tokens, context)
        prediction: Tensor = self.leave(tokens.transpose(1, 2).reshape(x.shape))
        return prediction


def main() -> None:
    file = Path(sys.argv[1], "lora.safetensors")
    torch.manual_seed(0)
    module = HandMade()
    model = ls.Trainable(module, title="hand-made")
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    contexts = [ls.Conditioning({"context": torch.randn(1, 5, CONTEXT)}) for _ in range(4)]
    data = [ls.Sample(torch.randn(CHANNELS, 8, 8), context) for context in contexts]
    common: dict[str, Any] = {"steps": 30, "targets": "all", "rank": 4, "batch_size": 4, "learning_rate": 1e-2}
    result = ls.train(model, data, training_dtype="fp32", **common)
    levers: dict[str, Any] = {"quantization": "int8", "activations": "selective", "gradient_checkpointing": True}
    spared = ls.train(model, data, training_dtype="fp32", **common, **levers)
    found = {
        "losses": result.losses,
        "spared": spared.losses,
        "trained": sorted(ref.path for ref in ls.Lora.load(result.lora.save(file), model).state.adapters),
        "layers": sorted(path for path, layer in module.named_modules() if is_targetable(layer)),
        "changed": [name for name, one in module.state_dict().items() if not torch.equal(one, weights[name])],
    }
    print(json.dumps(found))
