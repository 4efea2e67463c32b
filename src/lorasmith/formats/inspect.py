"""What can be said of a LoRA file without its base model."""

from __future__ import annotations

import collections
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.formats import lora_file  # noqa: F401  registers the layouts
from lorasmith.formats.container import read_safetensors
from lorasmith.formats.hashes import autov1, sha256_body, sha256_file
from lorasmith.formats.layout import LAYOUTS
from lorasmith.formats.metadata import steps_of
from lorasmith.formats.recognise import block_of, component_of, guessed_family
from lorasmith.formats.spelling import ModuleTensors, assembled, grouped, kronecker_shapes, rank_of, scale_of, split_key

__all__ = ["LoraSummary", "describe"]


@dataclass(frozen=True)
class LoraSummary:
    """A LoRA file at a glance.

    Attributes:
        path, size_bytes: the file.
        layouts: number of keys by the name of the layout that they look like.
        family: title of the family that names and shapes give away, or None.
        components: number of modules by component (`denoiser`, `text_encoder`, ...).
        algorithms: number of modules by algorithm; `difference` for those with full differences alone.
        ranks, alphas: number of modules by rank and by alpha (None: the file states none).
        factors, block_sizes: number of modules by LoKr's factor and by OFT's or BOFT's block size.
        tensors, parameters: counts; alphas are no parameters.
        dtypes: number of tensors by dtype, as `bfloat16`.
        norms: Frobenius norm of the weight change at strength 1 by block, over the block's LoRA modules.
        steps: optimizer updates, 0 when nothing tells.
        metadata: all of the header's.
        hashes: `sha256`, `autov1`, `autov2`, `autov3`.
        findings: one sentence for each thing wrong with the file.
    """

    path: Path
    size_bytes: int
    layouts: Mapping[str, int]
    family: str | None
    components: Mapping[str, int]
    algorithms: Mapping[str, int]
    ranks: Mapping[int, int]
    factors: Mapping[int, int]
    block_sizes: Mapping[int, int]
    alphas: Mapping[float | None, int]
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    norms: Mapping[str, float]
    steps: int
    metadata: Mapping[str, str]
    hashes: Mapping[str, str]
    findings: tuple[str, ...]


def describe(path: Path) -> LoraSummary:
    """Summary of a LoRA file.

    Raises:
        LoraError: the file cannot be read, or none of its tensors has a name that LoRA files use.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    groups = grouped(tensors)
    if not groups:
        raise LoraError(f"{path} is not a LoRA: none of its {len(tensors)} tensors has a name that LoRA files use")
    modules = {
        base: assembled({role: tensors[key] for role, key in keys.items()}, None) for base, keys in groups.items()
    }
    whole = {base: module for base, module in modules.items() if module is not None}
    adapters = {base: module.adapter for base, module in whole.items() if module.adapter is not None}
    digest = sha256_file(path)
    return LoraSummary(
        path=path,
        size_bytes=path.stat().st_size,
        layouts={name: count for name, layout in LAYOUTS.items() if (count := layout.detects(tensors))},
        family=guessed_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}),
        components=_counted(component_of(base) for base in groups),
        algorithms=_counted(module.adapter.algorithm if module.adapter else "difference" for module in whole.values()),
        ranks=_counted(rank for weights in adapters.values() if (rank := rank_of(weights)) is not None),
        factors=_counted(max(*kronecker_shapes(one.tensors)[0]) for one in adapters.values() if one.algorithm == "lokr"),
        block_sizes=_counted(
            one.tensors["oft_blocks"].shape[-1] for one in adapters.values() if one.algorithm in ("oft", "boft")
        ),
        alphas=_counted(weights.alpha for weights in adapters.values()),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha")),
        dtypes=_counted(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()),
        norms=_block_norms(adapters),
        steps=steps_of(metadata, path.name),
        metadata=metadata,
        hashes={
            "sha256": digest,
            "autov1": autov1(path),
            "autov2": digest[:10],
            "autov3": sha256_body(path)[:12],
        },
        findings=tuple(_findings(tensors, modules)),
    )


T = TypeVar("T", bound=Hashable)


def _counted(values: Iterable[T]) -> dict[T, int]:
    """How often each value occurs, most frequent first."""
    return dict(collections.Counter(values).most_common())


def _block_norms(adapters: Mapping[str, AdapterWeights]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for base, weights in adapters.items():
        if weights.algorithm == "lora" and "mid" not in weights.tensors:
            name = ".".join(part for part in (component_of(base), block_of(base)) if part)
            squares[name] = squares.get(name, 0.0) + _squared_norm(weights)
    return {name: math.sqrt(square) for name, square in squares.items()}


def _squared_norm(weights: AdapterWeights) -> float:
    """Squared Frobenius norm of scale · up · down, from two rank × rank products instead of the whole matrix."""
    up = weights.tensors["up"].flatten(1).float()
    down = weights.tensors["down"].flatten(1).float()
    # Rounding can leave a zero norm a little below zero.
    return scale_of(weights) ** 2 * max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)


def _findings(tensors: Mapping[str, Tensor], modules: Mapping[str, ModuleTensors | None]) -> Iterator[str]:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            yield f"{key} holds NaN or infinity"
    for base, module in modules.items():
        if module is None:
            yield f"{base} is incomplete: its tensors do not make up an adapter"
        elif module.adapter is not None and module.adapter.algorithm == "lora":
            zero = next((name for name in ("up", "down") if not module.adapter.tensors[name].any()), None)
            if zero is not None:
                yield f"{base} changes nothing: its {zero} matrix is zero"
    for key in tensors:
        if split_key(key) is None:
            yield f"{key} has no name that LoRA files use"
