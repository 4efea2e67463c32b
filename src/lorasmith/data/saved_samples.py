"""Encoded samples on disk: a folder of safetensors shards and an index, written as a whole or not at all.

    index.json                 the order of everything, texts and spans
    shard_0000.safetensors     latent.0, latent.1, ..., prompt.0.tensors.context, prompt.0.mask, ...

Each latent is a tensor of its own, and a conditioning that several samples share is stored once. Reading returns what
was written bit for bit, with its lists and batches. The files are untrusted, so everything is checked: ComfyUI's shards
(`comfyui_shards.py`) by the same rules.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorasmith.core.errors import DataError, OutputError
from lorasmith.core.files import atomic_folder, atomic_path, is_folder, read_regular, write_atomic
from lorasmith.core.folders import DATASET_SHARD
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.typed_json import typed
from lorasmith.families.base import Conditioning
from lorasmith.formats.container import count_non_finite, read_safetensors, serialised

INDEX = "index.json"  # which ComfyUI's data sets lack

_FORMAT = "lorasmith.training_dataset"
_VERSION = 1
_MOST_TENSORS = 50_000  # in a shard; a safetensors file may have twice as many
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OWN_FILES = re.compile(rf"{re.escape(INDEX)}|metadata\.json|{DATASET_SHARD}\d+\.(safetensors|pkl)")
"""Files of a saved data set, ours or ComfyUI's: a folder with other files is not overwritten."""


class LatentBatch(NamedTuple):
    """Latents of one size."""

    samples: Tensor  # (batch, channels, [frames,] height, width), not scaled for a denoiser
    downscale: int | None = None  # pixels per latent, if known


@dataclass(frozen=True)
class SavedSamples:
    """Latents and their conditionings, in lists as nodes pass them.

    There is one conditioning for each latent, or one for all.
    """

    latents: Sequence[LatentBatch]
    conditioning: Sequence[Sequence[Conditioning]]

    @property
    def flat(self) -> list[Conditioning]:
        return [one for combined in self.conditioning for one in combined]

    @property
    def distinct(self) -> list[Conditioning]:
        """The conditionings, shared ones once."""
        return list({id(one): one for one in self.flat}.values())

    def check(self, place: str) -> None:
        """Raise DataError for counts, shapes, dtypes or values that samples cannot have; `place` starts the message."""
        latents = sum(len(batch.samples) for batch in self.latents if batch.samples.ndim)
        prompts = self.flat
        if not latents:
            raise DataError(f"{place} must hold at least one latent, got none; encode some images")
        if len(prompts) not in (1, latents):
            raise DataError(
                f"{place} must hold one conditioning per latent or one for all, got {len(prompts):,} for {latents:,}; "
                "encode as many captions as images"
            )
        for number, samples in enumerate({id(one.samples): one.samples for one in self.latents}.values()):
            _check_latents(samples, f"{place}: latents {number}")
        for number, prompt in enumerate(self.distinct):
            _check_prompt(prompt, f"{place}: conditioning {number}")


def write_samples(folder: Path, samples: SavedSamples, *, shard_size: int) -> int:
    """Write samples to a folder, atomically replacing a data set that is there; returns the number of shards.

    `shard_size` is the most samples of a shard. DataError if counts do not match or values are not finite; OutputError
    if the folder holds other files, or cannot be written.
    """
    samples.check("a data set")
    _refuse_other_content(folder)
    numbers = {id(prompt): number for number, prompt in enumerate(samples.distinct)}
    with atomic_folder(folder) as new:
        names = []
        for number, tensors in enumerate(_shards(samples, numbers, shard_size)):
            names.append(f"{DATASET_SHARD}{number:04}.safetensors")
            with atomic_path(new / names[-1]) as temporary, temporary.open("wb") as file:
                for chunk in serialised(tensors, {}):
                    file.write(chunk)
        index = _Index(
            format=_FORMAT,
            version=_VERSION,
            shards=names,
            latents=[(len(batch.samples), batch.downscale) for batch in samples.latents],
            conditioning=[[numbers[id(one)] for one in combined] for combined in samples.conditioning],
            prompts=[_Prompt(_storable(one.text), one.span) for one in samples.distinct],
        )
        write_atomic(new / INDEX, json.dumps(dataclasses.asdict(index), ensure_ascii=False))
    return len(names)


def read_samples(folder: Path) -> SavedSamples:
    """Samples from `write_samples`, memory-mapped. DataError if a file is missing, damaged or contradicts the index."""
    index = _index(folder)
    if len(set(index.shards)) < len(index.shards):
        raise DataError(f"{folder / INDEX} must name each shard once; {_AGAIN}")
    tensors: dict[str, Tensor] = {}
    for name in index.shards:
        found, _ = read_safetensors(inside(folder, name), DataError)
        if twice := found.keys() & tensors.keys():
            raise DataError(
                f"{folder / name} must hold tensors of its own, but {min(twice)} is in two shards; {_AGAIN}"
            )
        tensors |= found
    latents = [
        LatentBatch(_joined(tensors, numbers, folder), downscale)
        for numbers, (_, downscale) in zip(_ranges(index, tensors, folder), index.latents, strict=True)
    ]
    parts = _parts_by_prompt(tensors, len(index.prompts), folder)
    prompts = [
        _conditioning(parts[number], said, f"{folder}: conditioning {number}")
        for number, said in enumerate(index.prompts)
    ]
    if any(not 0 <= number < len(prompts) for combined in index.conditioning for number in combined):
        raise DataError(f"{folder / INDEX} must name conditionings that it holds, and does not; {_AGAIN}")
    samples = SavedSamples(latents, [[prompts[number] for number in combined] for combined in index.conditioning])
    samples.check(str(folder))
    return samples


def inside(folder: Path, name: str) -> Path:
    """A data set's shard file. DataError for other names, and links that leave the folder."""
    if not _OWN_FILES.fullmatch(name):
        raise DataError(f"{folder} must name its shards {DATASET_SHARD}0000 and so on, got {name!r}; {_AGAIN}")
    if (folder / name).is_symlink() and not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder / name} must be a file, but is a link out of its folder; copy the file there")
    return folder / name


_AGAIN = "get the data set again, or save it again"


@dataclass(frozen=True)
class _Prompt:
    text: str | None
    span: tuple[float, float]


@dataclass(frozen=True)
class _Index:
    """`index.json`: names of the shards, size and pixels per latent of each batch, conditionings by number."""

    format: str
    version: int
    shards: list[str]
    latents: list[tuple[int, int | None]]
    conditioning: list[list[int]]
    prompts: list[_Prompt]


def _index(folder: Path) -> _Index:
    path = inside(folder, INDEX)
    try:
        index = typed(parse_foreign_json(read_regular(path)), _Index)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
    except ValueError as error:
        raise DataError(f"{path} must be the index of a data set, but it {error}; {_AGAIN}") from None
    if (index.format, index.version) != (_FORMAT, _VERSION):
        raise DataError(
            f"{path} must be of format {_FORMAT} {_VERSION}, got {index.format!r} {index.version}; use the version of "
            "Lorasmith that saved it"
        )
    return index


def _shards(samples: SavedSamples, numbers: Mapping[int, int], shard_size: int) -> Iterator[dict[str, Tensor]]:
    """Tensors of each shard by name; a conditioning is in the shard of the first latent that uses it."""
    prompts = samples.flat
    written: set[int] = set()
    shard: dict[str, Tensor] = {}
    start = 0
    for index, latent in enumerate(one for batch in samples.latents for one in batch.samples):
        if index - start == shard_size or len(shard) >= _MOST_TENSORS:
            yield shard
            shard, start = {}, index
        shard[f"latent.{index}"] = latent[None]
        if index < len(prompts) and (number := numbers[id(prompts[index])]) not in written:
            written.add(number)
            shard |= _tensors_of(prompts[index], number)
    yield shard


def _tensors_of(prompt: Conditioning, number: int) -> dict[str, Tensor]:
    tensors = {f"prompt.{number}.tensors.{name}": tensor for name, tensor in prompt.tensors.items()}
    return tensors if prompt.mask is None else {**tensors, f"prompt.{number}.mask": prompt.mask}


def _storable(text: str | None) -> str | None:
    """A text without lone surrogates, which UTF-8 cannot encode."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _refuse_other_content(folder: Path) -> None:
    if not folder.exists():
        return
    others = (
        [one.name for one in folder.iterdir() if not _OWN_FILES.fullmatch(one.name)] if is_folder(folder) else ["."]
    )
    if others:
        raise OutputError(
            f"{folder} must be a saved data set or new, but holds other files, such as {min(others)}; choose another "
            "folder_name"
        )


def _ranges(index: _Index, tensors: Iterable[str], folder: Path) -> list[range]:
    """Indices of the latents of each batch."""
    counts = [count for count, _ in index.latents]
    held = sum(name.startswith("latent.") for name in tensors)
    if sum(counts) != held or any(count < 1 for count in counts):
        raise DataError(
            f"the shards of {folder} must hold the {sum(counts):,} latents of its index, and hold {held:,}; {_AGAIN}"
        )
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _joined(tensors: Mapping[str, Tensor], numbers: range, folder: Path) -> Tensor:
    parts = [tensors.get(f"latent.{number}") for number in numbers]
    found = [part for part in parts if part is not None and part.ndim and len(part) == 1]
    if len(found) < len(parts) or len({(part.shape, part.dtype) for part in found}) > 1:
        raise DataError(
            f"latents {numbers.start} to {numbers.stop - 1} in {folder} must be there, of one shape and dtype; {_AGAIN}"
        )
    return found[0] if len(found) == 1 else torch.cat(found)


def _parts_by_prompt(tensors: Mapping[str, Tensor], count: int, folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of each conditioning, by the rest of their name."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        if kind == "latent":
            continue
        if kind != "prompt" or not re.fullmatch(r"\d{1,9}", number) or int(number) >= count:
            raise DataError(f"{folder} must hold latents and conditionings of its index alone, got {name!r}; {_AGAIN}")
        parts[int(number)][part] = tensor
    return parts


def _conditioning(parts: Mapping[str, Tensor], said: _Prompt, place: str) -> Conditioning:
    named = {name.removeprefix("tensors."): part for name, part in parts.items() if name.startswith("tensors.")}
    if parts.keys() - {"mask"} != {f"tensors.{name}" for name in named}:
        raise DataError(f"{place} must have tensors and a mask alone; {_AGAIN}")
    return Conditioning(named, said.text, parts.get("mask"), said.span)


def _check_latents(samples: Tensor, place: str) -> None:
    if samples.ndim not in (4, 5) or not samples.numel() or samples.dtype not in _FLOATS:
        raise DataError(
            f"{place} must be numbers (batch, channels, [frames,] height, width), got "
            f"{tuple(samples.shape)} of {str(samples.dtype).removeprefix('torch.')}; encode the pictures again"
        )
    _check_finite(samples, place)


def _check_prompt(prompt: Conditioning, place: str) -> None:
    context = prompt.tensors.get("context")
    if context is None or context.ndim < 3 or not context.numel() or context.dtype not in _FLOATS:
        got = "none" if context is None else f"{tuple(context.shape)} of {str(context.dtype).removeprefix('torch.')}"
        raise DataError(f"the context of {place} must be numbers (batch, tokens, width), got {got}; encode it again")
    for name, tensor in prompt.tensors.items():
        if tensor.ndim == 0 or len(tensor) != len(context):
            raise DataError(
                f"{name} of {place} must have the batch of the context, {len(context)}, got shape "
                f"{tuple(tensor.shape)}; encode it again"
            )
        _check_finite(tensor, f"{name} of {place}")
    mask = prompt.mask
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != context.shape[:2]):
        raise DataError(
            f"the mask of {place} must be bool of shape {tuple(context.shape[:2])}, got {tuple(mask.shape)} of "
            f"{str(mask.dtype).removeprefix('torch.')}; encode it again"
        )
    start, end = prompt.span
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise DataError(f"the span of {place} must be within 0 and 1, got {start} to {end}; {_AGAIN}")


def _check_finite(tensor: Tensor, place: str) -> None:
    if count := count_non_finite(tensor):
        raise DataError(
            f"{place} must be finite, but {count:,} of {tensor.numel():,} values are NaN or infinite; encode it again"
        )
