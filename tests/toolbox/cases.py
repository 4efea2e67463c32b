"""LoRAs made for a model's name table, and what they mean by definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.families.model import Model
from lorasmith.formats.lora_file import save_lora
from lorasmith.formats.names import ModelNames

ATTENTION = ("attn1.to_q", "attn2.to_k", "conv1", "proj_in")
"""Ends of the paths that most tests change: matrices of two widths, convolutions of both sizes."""


def shapes_of(model: Model, ends: Sequence[str] = ATTENTION) -> dict[ModuleRef, tuple[int, ...]]:
    """Weight shapes of the denoiser's modules with such paths, and of a text encoder's projections."""
    shapes = {
        ModuleRef(DENOISER, path): shape
        for path, shape in model.names.weight_shapes.items()
        if path.endswith(tuple(ends)) and len(shape) > 1
    }
    for component, encoder in model.components.text_encoders.items():
        for path in model.names.paths(component):
            if path.endswith("q_proj"):
                module = dict(encoder.named_modules()).get(path) or encoder.get_submodule(
                    path.removeprefix("text_model.")
                )
                shapes[ModuleRef(component, path)] = tuple(module.weight.shape)
    return shapes


def random_weights(
    shape: Sequence[int],
    algorithm: str = "lora",
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    seed: int = 0,
    variant: str = "",
    size: float = 0.1,
) -> AdapterWeights:
    """A random adapter for a weight of a shape; `variant` is `tucker`, `dora` or nothing."""
    generator = torch.Generator().manual_seed(seed)
    out, inside, *kernel = shape
    flat = inside * int(torch.tensor(kernel).prod()) if kernel else inside
    point = (1,) * len(kernel)

    def values(*dimensions: int) -> Tensor:
        return torch.randn(dimensions, generator=generator) * size

    match algorithm:
        case "lora" if variant == "tucker":
            tensors = {"down": values(rank, inside, *point), "up": values(out, rank, *point)}
            tensors["mid"] = values(rank, rank, *kernel)
        case "lora":
            tensors = {"down": values(rank, inside, *kernel), "up": values(out, rank, *point)}
            if variant == "dora":
                tensors["dora_scale"] = 1 + values(out, 1, *point).abs()
        case "loha":
            sizes = {"hada_w1_a": (out, rank), "hada_w1_b": (rank, flat)}
            sizes |= {"hada_w2_a": (out, rank), "hada_w2_b": (rank, flat)}
            tensors = {name: values(*dimensions) for name, dimensions in sizes.items()}
        case "lokr":
            tensors = {"lokr_w1": values(2, 2), "lokr_w2": values(out // 2, inside // 2, *kernel)}
        case "oft":
            tensors = {"oft_blocks": values(out // 4, 4, 4)}
            alpha = 0.0
        case _:
            raise AssertionError(algorithm)
    return AdapterWeights(algorithm, tensors, alpha)


def lora_state(shapes: Mapping[ModuleRef, Sequence[int]], algorithm: str = "lora", **settings: object) -> AdapterState:
    """A LoRA with a random adapter on each module, no two alike."""
    seed = int(settings.pop("seed", 0))  # type: ignore[call-overload]
    return AdapterState(
        {
            ref: random_weights(shape, algorithm, seed=1000 * seed + index, **settings)  # type: ignore[arg-type]
            for index, (ref, shape) in enumerate(shapes.items())
        }
    )


def saved(path: Path, state: AdapterState, names: ModelNames, layout: str = "kohya", **settings: object) -> Path:
    save_lora(
        path, state, names, layout=layout, metadata={"ss_network_dim": "4", "ss_output_name": path.stem}, **settings
    )  # type: ignore[arg-type]
    return path


def weight_change(weights: AdapterWeights) -> Tensor:
    """ΔW (out, in · kernel) of an additive adapter by its definition, in double precision."""
    tensors = {name: tensor.double() for name, tensor in weights.tensors.items()}
    match weights.algorithm:
        case "lora" if "mid" in tensors:
            product = torch.einsum(
                "om,mn...,nc->oc...", tensors["up"].flatten(1), tensors["mid"], tensors["down"].flatten(1)
            )
            product, rank = product.flatten(1), tensors["down"].shape[0]
        case "lora":
            product, rank = tensors["up"].flatten(1) @ tensors["down"].flatten(1), tensors["down"].shape[0]
        case "loha":
            product = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
            rank = tensors["hada_w1_b"].shape[0]
        case _:
            first, second = tensors["lokr_w1"], tensors["lokr_w2"]
            return torch.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second).flatten(1)
    return product * (1.0 if weights.alpha is None else weights.alpha / rank)
