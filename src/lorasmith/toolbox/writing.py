"""Output of the tools: targets that are overwritten only on request, and headers that record the operation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import ModelError, OutputError
from lorasmith.core.files import atomic_path, check_writable, open_regular
from lorasmith.core.folders import pipeline_index
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.formats.container import check_safetensors, read_safetensors
from lorasmith.formats.metadata import RUN_ENTRY
from lorasmith.formats.scales import rank_of

HISTORY = "lorasmith.history"  # header entry to which each tool adds a line


def free_target(path: Path, *, overwrite: bool = False) -> Path:
    """`path`, checked before any work. Raises OutputError if it may not be overwritten or cannot be written."""
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another name with --output, or add --overwrite")
    check_writable(path.parent)
    return path


def file_target(path: Path, *, overwrite: bool = False) -> Path:
    """The same for a safetensors file, whose name must have that extension."""
    if path.suffix.casefold() != ".safetensors":
        raise OutputError(f"the output must be a file whose name ends in .safetensors, got {path}; choose another name")
    return free_target(path, overwrite=overwrite)


def folder_target(target: Path) -> Path:
    """`target`, for a diffusers model. Raises OutputError if another kind of file or folder exists there."""
    if target.exists() and pipeline_index(target) is None:
        raise OutputError(f"{target} is no diffusers model, and only one is replaced by another; choose another output")
    return target


def rewritten(
    source: Path, target: Path, changes: Mapping[str, Callable[[Tensor], Tensor]], metadata: Mapping[str, str]
) -> None:
    """Copy a safetensors file atomically with some tensors changed, one at a time; others are copied byte by byte.

    `changes` maps names to functions from the old value to a new one of the same shape and dtype. Raises ModelError if
    the source is damaged, and OutputError.
    """
    body = check_safetensors(source, ModelError).body_start
    tensors, _ = read_safetensors(source, ModelError)
    with open_regular(source) as old, atomic_path(target) as temporary:
        entries = parse_foreign_json(old.read(body)[8:])
        entries["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        del entries["__metadata__"]
        with temporary.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                start, end = entry["data_offsets"]
                if name in changes:
                    value = changes[name](tensors[name]).contiguous().reshape(-1).view(torch.uint8)
                    new.write(value.numpy().data)
                else:
                    old.seek(body + start)
                    _copy(old, new, end - start)


def noted(metadata: Mapping[str, str], note: str) -> dict[str, str]:
    """Metadata with one more line of history, without the record of the training run, which no longer applies."""
    lines = [*([metadata[HISTORY]] if metadata.get(HISTORY) else []), note]
    kept = {key: value for key, value in metadata.items() if key != RUN_ENTRY}
    return {**kept, HISTORY: "\n".join(lines)}


def rank_entries(adapters: Iterable[AdapterWeights]) -> dict[str, str]:
    """Rank and alpha for kohya's metadata: numbers, or `Dynamic` if modules differ."""
    known = [(rank, weights.alpha) for weights in adapters if (rank := rank_of(weights)) is not None]
    ranks = {str(rank) for rank, _ in known}
    alphas = {str(float(rank if alpha is None else alpha)) for rank, alpha in known}
    if not ranks:
        return {}
    return {
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
    }


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        piece = old.read(min(count, 1 << 24))
        new.write(piece)
        count -= len(piece)
