"""A summary of a LoRA file, without its base model."""

from __future__ import annotations

import collections
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorasmith.adapters.algorithms import format_of, size_of, words_of
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import LoraError
from lorasmith.formats.faults import faults_in_file
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.layouts.peft import stated_alphas
from lorasmith.formats.lora_file import read_lora_tensors
from lorasmith.formats.metadata import autov1, sha256_body, sha256_file, steps_of
from lorasmith.formats.scales import rank_of, scale_of
from lorasmith.formats.spelling import (
    ModuleTensors,
    all_assembled,
    block_of,
    component_of,
    grouped,
    guessed_family,
    kind_of,
    without_core,
)


@dataclass(frozen=True)
class LoraSummary:
    """A LoRA file at a glance."""

    path: Path
    size_bytes: int
    layouts: Mapping[str, int]  # number of keys by the layout that detects them
    family: str | None  # title of the family recognised by names and shapes, or None
    components: Mapping[str, int]  # number of modules by component (`denoiser`, `text_encoder`, ...)
    layers: Mapping[str, int]  # number of modules by kind of layer (`attn1_to_q`, `ff_net_2`), in the file's spelling
    algorithms: Mapping[str, int]  # number of modules by algorithm; `difference` for those with differences alone
    magnitudes: Mapping[str, int]  # number of modules with DoRA's magnitudes, by axis (`output`, `input`)
    ranks: Mapping[int, int]  # number of modules by rank
    factors: Mapping[int, int]  # number of modules by LoKr's factor
    block_sizes: Mapping[int, int]  # number of modules by OFT's or BOFT's block size
    alphas: Mapping[float | None, int]  # number of modules by alpha (None: the file states none)
    tensors: int
    parameters: int  # without alphas
    dtypes: Mapping[str, int]  # number of tensors by dtype, as `bfloat16`
    # Frobenius norm of the weight change at strength 1 by block. OFT, BOFT and GLoRA, whose change depends on the
    # weight, and DoRA's magnitudes are left out.
    norms: Mapping[str, float]
    steps: int  # optimizer updates, 0 if unknown
    metadata: Mapping[str, str]  # all of the header's
    hashes: Mapping[str, str]  # `sha256`, `autov1`, `autov2`, `autov3`
    findings: tuple[str, ...]  # one sentence for each fault of the file; see `formats.faults`


def describe(path: Path) -> LoraSummary:
    """Summary of a LoRA file, or of a PEFT or diffusers folder.

    Tensors are memory-mapped, and read one module at a time.
    """
    path = Path(path)
    tensors, metadata = read_lora_tensors(path)
    groups = grouped(tensors)
    if not groups:
        raise LoraError(f"{path} is not a LoRA: none of its {len(tensors)} tensors has a name that LoRA files use")
    whole, unfit = all_assembled(tensors, groups, stated_alphas(tensors, groups, metadata))
    adapters = {base: module.adapter for base, module in whole.items() if module.adapter is not None}
    layouts = {name: layout.detects(tensors) for name, layout in LAYOUTS.items()}
    main_layout = LAYOUTS[max(layouts, key=lambda name: layouts[name])]
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return LoraSummary(
        path=path,
        size_bytes=sum(file.stat().st_size for file in files),
        layouts={name: count for name, count in layouts.items() if count},
        family=guessed_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata),
        components=_counted(component_of(base) for base in groups),
        layers=_counted(kind_of(base) for base in groups),
        algorithms=_counted(module.adapter.algorithm if module.adapter else "difference" for module in whole.values()),
        magnitudes=_counted(
            "output" if one.tensors["dora_scale"].shape[0] > 1 else "input"
            for one in adapters.values()
            if "dora_scale" in one.tensors
        ),
        ranks=_counted(rank for weights in adapters.values() if (rank := rank_of(weights)) is not None),
        factors=_sizes("factor", adapters.values()),
        block_sizes=_sizes("block size", adapters.values()),
        alphas=_counted(weights.alpha for weights in adapters.values()),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha")),
        dtypes=_counted(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()),
        norms=_block_norms(whole),
        steps=steps_of(metadata, path.name),
        metadata=metadata,
        hashes=_hashes(files[0]) if len(files) == 1 else {},
        findings=tuple(
            fault.problem
            for fault in faults_in_file(tensors, metadata, groups, whole, unfit, main_layout)
            if fault.is_error
        ),
    )


def squared_change(module: ModuleTensors) -> float | None:
    """Squared Frobenius norm of a module's change at strength 1.

    None if the change depends on the weight: OFT, BOFT, GLoRA. DoRA's magnitudes, which do so too, are left out.
    """
    total = sum(float(tensor.float().square().sum()) for tensor in module.differences.values())
    weights = module.adapter
    if weights is None:
        return total
    squared_norm = format_of(weights).squared_norm
    if squared_norm is None:
        return None
    plain = without_core(weights)
    return total + scale_of(plain) ** 2 * squared_norm(plain.tensors)


T = TypeVar("T", bound=Hashable)


def _counted(values: Iterable[T]) -> dict[T, int]:
    """How often each value occurs, most frequent first."""
    return dict(collections.Counter(values).most_common())


def _sizes(meaning: str, adapters: Iterable[AdapterWeights]) -> dict[int, int]:
    """Number of adapters by the value of `rank`, for algorithms in which it has this meaning."""
    return _counted(
        size for one in adapters if words_of(one.algorithm).rank_meaning == meaning and (size := size_of(one))
    )


def _hashes(file: Path) -> dict[str, str]:
    digest = sha256_file(file)
    return {"sha256": digest, "autov1": autov1(file), "autov2": digest[:10], "autov3": sha256_body(file)[:12]}


def _block_norms(modules: Mapping[str, ModuleTensors]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for base, module in modules.items():
        change = squared_change(module)
        if change is not None:
            name = ".".join(part for part in (component_of(base), block_of(base)) if part)
            squares[name] = squares.get(name, 0.0) + change
    return {name: math.sqrt(square) for name, square in squares.items()}
