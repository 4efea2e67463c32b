"""Train a denoiser of plain torch modules, as a program that loads its models itself would.

`test_torch_only` runs `main` in a process that cannot import diffusers. It prints what it found, as JSON.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.inject import Rule
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.diffusion.schedule import FlowSchedule
from lorasmith.families.base import Components, Conditioning, Defaults, Family, LatentFormat
from lorasmith.families.model import Model
from lorasmith.formats.names import ModelNames, OriginalName
from lorasmith.runs.library import train
from lorasmith.training.lora_handle import Lora

ENGINE = ("core", "adapters", "formats", "diffusion", "data", "training")
CHANNELS, WIDTH, CONTEXT = 4, 32, 24


class Block(nn.Module):
    """Attention to the text, then a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(CONTEXT, WIDTH)
        self.to_v = nn.Linear(CONTEXT, WIDTH)
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.outer = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context))
        y: Tensor = x + self.outer(nn.functional.silu(self.inner(self.norm(x))))
        return y


class HandMade(nn.Module):
    """A denoiser that nobody's library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.leave = nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)

    def forward(self, latents: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.enter(latents)
        tokens = x.flatten(2).transpose(1, 2) + self.time(time.to(x.dtype)[:, None])[:, None]
        for block in self.blocks:
            tokens = block(tokens, context)
        prediction: Tensor = self.leave(tokens.transpose(1, 2).reshape(x.shape))
        return prediction


class Plain(Family):
    """What training asks of a family; all else is refused below."""

    name = "plain"
    title = "Hand-made"
    modelspec_implementation = "tests"
    targets: Mapping[str, Rule] = {}
    repeatable_context = True

    def names(self, denoiser: nn.Module, text_encoders: Mapping[str, nn.Module]) -> ModelNames:
        shapes = {
            path: tuple(layer.weight.shape)
            for path, layer in denoiser.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        return ModelNames(
            family=self.name,
            denoiser={path: OriginalName(path) for path in shapes},
            weight_shapes=shapes,
            peft_prefix="unet",
        )

    def conditioning_shapes(self, denoiser: nn.Module) -> Mapping[str, tuple[int, ...]]:
        return {"context": (1, 5, CONTEXT)}

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = denoiser(latents, time, conditioning.tensors["context"])
        return prediction

    def kohya_version(self, parameterization: str) -> str:
        return "hand-made"

    def modelspec_architecture(self, parameterization: str) -> str:
        return "hand-made"


def main() -> None:
    folder = Path(sys.argv[1])
    model = hand_made()
    module = model.components.denoiser
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    g = torch.Generator().manual_seed(1)
    samples = tuple(
        Sample(
            torch.randn(CHANNELS, 8, 8, generator=g),
            Conditioning({"context": torch.randn(1, 5, CONTEXT, generator=g)}),
            f"{index}",
        )
        for index in range(4)
    )
    data = EncodedDataset(samples)
    common: dict[str, Any] = {"steps": 30, "rank": 4, "batch_size": 4, "learning_rate": 1e-2, "training_dtype": "fp32"}
    result = train(model, data, output=folder / "run", **common)
    levers: dict[str, Any] = {"quantization": "int8", "activations": "selective", "gradient_checkpointing": True}
    spared = train(model, data, **common, **levers)
    assert result.path is not None
    again = Lora.load(result.path, model)
    print(
        json.dumps(
            {
                "losses": result.losses,
                "spared": spared.losses,
                "trained": sorted(ref.path for ref in again.state.adapters),
                "layers": sorted(model.names.denoiser),
                "changed": [name for name, one in module.state_dict().items() if not torch.equal(one, weights[name])],
                "modules": every_module(),
            }
        )
    )


def hand_made() -> Model:
    """The model, as a program would wrap the one that it has loaded."""
    torch.manual_seed(0)
    denoiser = HandMade().requires_grad_(False)
    components = Components(
        denoiser=denoiser,
        schedule=FlowSchedule(),
        parameterization="flow",
        latent=LatentFormat(channels=CHANNELS, downscale=8, scale=1.0),
        defaults=Defaults(
            resolution=64,
            pixel_multiple=8,
            learning_rate=1e-3,
            targets="all",
            guidance=1.0,
            timestep_distribution="uniform",
        ),
    )
    unasked = dict.fromkeys(Plain.__abstractmethods__, _refused)
    family: Family = type("Whole", (Plain,), unasked)()
    return Model(family, components, title="hand-made")


def every_module() -> int:
    """How many modules of the engine there are, each of which is imported."""
    found = [
        one.name
        for room in ENGINE
        for one in pkgutil.walk_packages(importlib.import_module(f"lorasmith.{room}").__path__, f"lorasmith.{room}.")
    ]
    for name in found:
        importlib.import_module(name)
    return len(found)


def _refused(*_: object, **__: object) -> Any:
    raise AssertionError("training must not ask this of a family")
