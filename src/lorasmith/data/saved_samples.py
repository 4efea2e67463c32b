"""Encoded samples on disk: a folder of safetensors shards and an index, written as a whole or not at all.

    index.json                 the order of everything, texts and spans
    shard_0000.safetensors     latent.0, latent.1, ..., prompt.0.tensors.context, prompt.0.mask, ...

Each latent is a tensor of its own, and a conditioning that several samples share is stored once. Reading returns what
was written bit for bit, with its lists and batches. The files are untrusted, so everything is checked.

Folders of ComfyUI's SaveTrainingDataset are read by the same rules. Their shards are torch files (zip archives) with
`latents`, a list of `{"samples": tensor}`, and `conditioning`, a list of lists of pairs
`[context, {"pooled_output": tensor, ...}]`, which `core.tensor_pickles` reads without running their code.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorasmith.core.errors import DataError, OutputError
from lorasmith.core.files import atomic_folder, atomic_path, is_folder, read_regular, write_atomic
from lorasmith.core.folders import DATASET_SHARD
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.tensor_pickles import unpickled
from lorasmith.core.typed_json import typed
from lorasmith.families.conditionings import Conditioning
from lorasmith.formats.container import count_non_finite, read_safetensors, serialised

INDEX = "index.json"  # which ComfyUI's data sets lack
_FORMAT = "lorasmith.training_dataset"
_VERSION = 1
_MOST_TENSORS = 50_000  # in a shard; a safetensors file may have twice as many
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OWN_FILES = re.compile(rf"{re.escape(INDEX)}|metadata\.json|{DATASET_SHARD}\d+\.(safetensors|pkl)")
"""Files of a saved data set, ours or ComfyUI's: a folder with other files is not overwritten."""

_AGAIN = "get the data set again, or save it again"
_MOST_CONDITIONINGS = 100_000
_IDS, _WEIGHTS = "t5xxl_ids", "t5xxl_weights"
"""Options of a prompt's T5 tokens, without a batch, which a denoiser with a text adapter reads."""

_VOCABULARY = 32128  # T5 token ids
_OPTIONS = frozenset({"pooled_output", "guidance", "attention_mask", "start_percent", "end_percent", _IDS, _WEIGHTS})
_LATENT_KEYS = frozenset({"samples", "downscale_ratio_spacial"})
_COMFYUI_AGAIN = "save it again with ComfyUI, or get it again"
_LISTS = ("latents", "conditioning")


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
        return [conditioning for combined in self.conditioning for conditioning in combined]

    @property
    def distinct(self) -> list[Conditioning]:
        """The conditionings, shared ones once."""
        return list({id(conditioning): conditioning for conditioning in self.flat}.values())

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
        for number, samples in enumerate({id(latent.samples): latent.samples for latent in self.latents}.values()):
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
            conditioning=[
                [numbers[id(conditioning)] for conditioning in combined] for combined in samples.conditioning
            ],
            prompts=[_Prompt(_storable(conditioning.text), conditioning.span) for conditioning in samples.distinct],
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
        _conditioning(parts[number], prompt, f"{folder}: conditioning {number}")
        for number, prompt in enumerate(index.prompts)
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


def is_comfyui_dataset(folder: Path) -> bool:
    """Whether a folder holds pickled shards."""
    return bool(_comfyui_shards(folder))


def read_comfyui_dataset(folder: Path) -> tuple[SavedSamples, list[str]]:
    """The samples in a folder that ComfyUI wrote, and the names of entries that were ignored.

    DataError if a shard is damaged, holds anything but tensors and plain values, or the samples are invalid.
    """
    latents: list[LatentBatch] = []
    conditioning: list[list[Conditioning]] = []
    ignored: dict[str, None] = {}
    for name in _comfyui_shards(folder):
        shard = _Shard.read(inside(folder, name))
        latents += shard.latents()
        conditioning += shard.conditionings()
        ignored |= shard.ignored
    samples = SavedSamples(latents, conditioning)
    samples.check(str(folder))
    return samples, list(ignored)


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
    for index, latent in enumerate(sample for batch in samples.latents for sample in batch.samples):
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
        [path.name for path in folder.iterdir() if not _OWN_FILES.fullmatch(path.name)] if is_folder(folder) else ["."]
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
    rows = [part for part in parts if part is not None and part.ndim and len(part) == 1]
    if len(rows) < len(parts) or len({(part.shape, part.dtype) for part in rows}) > 1:
        raise DataError(
            f"latents {numbers.start} to {numbers.stop - 1} in {folder} must be there, of one shape and dtype; {_AGAIN}"
        )
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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


def _conditioning(parts: Mapping[str, Tensor], prompt: _Prompt, place: str) -> Conditioning:
    named = {name.removeprefix("tensors."): part for name, part in parts.items() if name.startswith("tensors.")}
    if parts.keys() - {"mask"} != {f"tensors.{name}" for name in named}:
        raise DataError(f"{place} must have tensors and a mask alone; {_AGAIN}")
    return Conditioning(named, prompt.text, parts.get("mask"), prompt.span)


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


def _comfyui_shards(folder: Path) -> list[str]:
    """Names of the pickled shards, sorted."""
    pattern = re.compile(rf"{DATASET_SHARD}(\d+)\.pkl")
    try:
        found = [(int(match[1]), path.name) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    return [name for _, name in sorted(found)]


@dataclass
class _Shard:
    path: Path
    lists: dict[str, list[Any]]  # `latents` and `conditioning`
    budget: int  # bytes left for tensors: views of one storage are together no larger than the file
    ignored: dict[str, None] = field(default_factory=dict)  # names of unsupported options
    converted: dict[int, Conditioning] = field(default_factory=dict)  # by the id of their pair
    tensors: dict[int, Tensor] = field(default_factory=dict)  # those used, by id

    @classmethod
    def read(cls, path: Path) -> _Shard:
        shard = unpickled(path, DataError, what="a shard of ComfyUI's", remedy=_COMFYUI_AGAIN)
        if not isinstance(shard, dict) or not all(isinstance(shard.get(key), list) for key in _LISTS):
            raise DataError(f"{path} must hold lists of latents and conditionings, and does not; {_COMFYUI_AGAIN}")
        return cls(path, shard, path.stat().st_size)

    def latents(self) -> list[LatentBatch]:
        batches = []
        for batch in self.lists["latents"]:
            if not isinstance(batch, dict):
                raise DataError(f"{self.path} must hold tensors as latents, and does not; {_COMFYUI_AGAIN}")
            self._ignore(batch, _LATENT_KEYS)
            downscale = batch.get("downscale_ratio_spacial")
            known = type(downscale) is int and 0 < downscale < 1000
            batches.append(LatentBatch(self._tensor(batch.get("samples"), "latents"), downscale if known else None))
        return batches

    def conditionings(self) -> list[list[Conditioning]]:
        entries = self.lists["conditioning"]
        if not all(isinstance(entry, list) for entry in entries):
            raise DataError(f"{self.path} must hold lists of conditionings, and does not; {_COMFYUI_AGAIN}")
        if (count := sum(map(len, entries))) > _MOST_CONDITIONINGS:
            raise DataError(
                f"{self.path} must hold at most {_MOST_CONDITIONINGS:,} conditionings, got {count:,}; use less"
            )
        return [[self._conditioning(pair) for pair in entry] for entry in entries]

    def _conditioning(self, pair: Any) -> Conditioning:
        if id(pair) not in self.converted:
            self.converted[id(pair)] = self._converted(pair)
        return self.converted[id(pair)]

    def _converted(self, pair: Any) -> Conditioning:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[1], dict):
            raise DataError(f"{self.path} must hold conditionings as pairs of tensor and options; {_COMFYUI_AGAIN}")
        context, options = self._tensor(pair[0], "the context"), pair[1]
        self._ignore({key: value for key, value in options.items() if value is not None}, _OPTIONS)
        tensors = {"context": context}
        if (pooled := options.get("pooled_output")) is not None:
            tensors["pooled"] = self._tensor(pooled, "pooled_output")
        if options.get(_IDS) is not None:
            tensors |= self._tokens(options, len(context))
        if options.get("guidance") is not None:
            tensors["guidance"] = torch.full((len(context),), self._number(options, "guidance", 0.0))
        mask = None
        if (attention := options.get("attention_mask")) is not None:
            attended = self._tensor(attention, "attention_mask") != 0
            mask = None if attended.all() else attended
        span = self._number(options, "start_percent", 0.0), self._number(options, "end_percent", 1.0)
        return Conditioning(tensors, mask=mask, span=span)

    def _tokens(self, options: dict[Any, Any], batch: int) -> dict[str, Tensor]:
        """T5 token ids and weights, the same for each prompt of a batch."""
        ids = self._tensor(options[_IDS], _IDS)
        weights = (
            torch.ones(ids.shape)
            if (token_weights := options.get(_WEIGHTS)) is None
            else self._tensor(token_weights, _WEIGHTS)
        )
        are_tokens = ids.dtype in (torch.int32, torch.int64) and ids.ndim == 1 and ids.numel() > 0
        are_tokens = are_tokens and ids.shape == weights.shape
        if not are_tokens or int(ids.min()) < 0 or int(ids.max()) >= _VOCABULARY or not weights.isfinite().all():
            raise DataError(
                f"{self.path} must hold {_IDS} from 0 to {_VOCABULARY - 1} and as many finite {_WEIGHTS}, and does "
                f"not; {_COMFYUI_AGAIN}"
            )
        return {_IDS: ids.long().expand(batch, -1), _WEIGHTS: weights.float().expand(batch, -1)}

    def _tensor(self, value: Any, name: str) -> Tensor:
        if type(value) is not Tensor or not value.ndim:
            raise DataError(f"{name} in {self.path} must be a tensor, got {type(value).__name__}; {_COMFYUI_AGAIN}")
        if id(value) not in self.tensors:
            self.tensors[id(value)] = value.detach()
            self.budget -= value.numel() * value.element_size()
        if self.budget < 0:
            raise DataError(f"{self.path} must hold the tensors that it announces, and is too small; {_COMFYUI_AGAIN}")
        return self.tensors[id(value)]

    def _number(self, options: dict[Any, Any], name: str, default: float) -> float:
        number = options.get(name, default)
        if type(number) not in (int, float) or not abs(number) <= 1e6:
            raise DataError(
                f"{name} in {self.path} must be a number up to 10⁶, got {type(number).__name__}; {_COMFYUI_AGAIN}"
            )
        return float(number)

    def _ignore(self, content: dict[Any, Any], known: frozenset[str]) -> None:
        self.ignored.update(dict.fromkeys(key for key in content if isinstance(key, str) and key not in known))
