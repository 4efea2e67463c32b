"""Train a denoiser that nobody's library knows.

`test_torch_only` runs `main` in a process that cannot import diffusers. It prints what it found, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import lorasmith as ls
from lorasmith.adapters.frozen_layer import is_targetable
from tests.training.hand_made import CHANNELS, HandMade

CONTEXT = 24


def main() -> None:
    file = Path(sys.argv[1], "lora.safetensors")
    torch.manual_seed(0)
    module = HandMade(CONTEXT)
    model = ls.Trainable(module, title="hand-made")
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    contexts = [ls.Conditioning({"context": torch.randn(1, 5, CONTEXT)}) for _ in range(4)]
    data = [ls.Sample(torch.randn(CHANNELS, 8, 8), context) for context in contexts]
    common: dict[str, Any] = {"steps": 20, "targets": "all", "rank": 4, "batch_size": 4, "learning_rate": 1e-2}
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
