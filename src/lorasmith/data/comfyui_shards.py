"""Encoded samples that ComfyUI's SaveTrainingDataset wrote: pickled shards, of which tensors and plain values are read.

A shard is a torch file (a zip archive) with `latents`, a list of `{"samples": tensor}`, and `conditioning`, a list of
lists of pairs `[context, {"pooled_output": tensor, ...}]`.

Pickles can run code. torch reads these with `weights_only`, which runs none, and memory-mapped, where no tensor reaches
beyond the file. Even this reader calls more functions than a dataset needs, some of which allocate what a file asks
for, so the names in a pickle are checked first, and only those of tensors pass.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.files import open_regular
from lorasmith.core.folders import DATASET_SHARD
from lorasmith.data.saved_samples import LatentBatch, SavedSamples, inside
from lorasmith.families.base import Conditioning

_ALLOWED = re.compile(
    r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch (Float|Half|BFloat16|Double|Long|Int|Bool)Storage"
)
"""Globals that a shard's pickle may name: tensors, and the empty dictionary of hooks that each has."""

_MOST_PICKLE_BYTES = 64 * 2**20
_SPARE_OPCODES, _BYTES_PER_OPCODE = 100_000, 16
"""A latent has some 40 opcodes, and at least 512 bytes. Each opcode may make an object of a hundred bytes."""
_DEEPEST_TUPLE = 10  # that of a tensor has 2
_MOST_CONDITIONINGS = 100_000
_IDS, _WEIGHTS = "t5xxl_ids", "t5xxl_weights"
"""Options of a prompt's T5 tokens, without a batch, which a denoiser with a text adapter reads."""
_VOCABULARY = 32128  # T5 token ids
_OPTIONS = frozenset({"pooled_output", "guidance", "attention_mask", "start_percent", "end_percent", _IDS, _WEIGHTS})
_LATENT_KEYS = frozenset({"samples", "downscale_ratio_spacial"})
_AGAIN = "save it again with ComfyUI, or get it again"


def is_comfyui_dataset(folder: Path) -> bool:
    """Whether a folder holds pickled shards."""
    return bool(_shards(folder))


def read_comfyui_dataset(folder: Path) -> tuple[SavedSamples, list[str]]:
    """The samples in a folder that ComfyUI wrote, and the names of entries that were ignored.

    DataError if a shard is damaged, holds anything but tensors and plain values, or the samples are invalid.
    """
    latents: list[LatentBatch] = []
    conditioning: list[list[Conditioning]] = []
    ignored: dict[str, None] = {}
    for name in _shards(folder):
        shard = _Shard.read(inside(folder, name))
        latents += shard.latents()
        conditioning += shard.conditionings()
        ignored |= shard.ignored
    samples = SavedSamples(latents, conditioning)
    samples.check(str(folder))
    return samples, list(ignored)


_LISTS = ("latents", "conditioning")


def _shards(folder: Path) -> list[str]:
    """Names of the pickled shards, sorted."""
    pattern = re.compile(rf"{DATASET_SHARD}(\d+)\.pkl")
    try:
        found = [(int(match[1]), one.name) for one in folder.iterdir() if (match := pattern.fullmatch(one.name))]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    return [name for _, name in sorted(found)]


def _unpickled(path: Path) -> Any:
    try:
        _check_pickle(path)
        # Mapped, a tensor whose size a file exaggerates is refused instead of read from beyond its bytes.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or 'damaged'}); {_AGAIN}") from error
    except Exception as error:  # torch's reader raises whatever the damage leads to
        raise DataError(
            f"{path} must be a shard of ComfyUI's with tensors alone, and cannot be read; {_AGAIN}"
        ) from error


def _check_pickle(path: Path) -> None:
    """Raise DataError for a shard that is not a torch file, or whose pickle refers to more than tensors.

    Damaged archives and pickles may raise any other exception.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        pickles = [one for one in entries if one.filename.rpartition("/")[2] == "data.pkl"]
        is_packed = any(one.compress_type or one.file_size != one.compress_size for one in entries)
        if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE_BYTES or is_packed:
            raise DataError(f"{path} must be one torch file, and is not; {_AGAIN}")
        content = archive.read(pickles[0])
        beside = os.fstat(file.fileno()).st_size - len(content)
    most = _SPARE_OPCODES + beside // _BYTES_PER_OPCODE
    nesting: list[int] = []  # for each value on the stack: 0, or how many tuples are nested in that tuple, itself too
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count == most:
            raise DataError(
                f"{path} must hold tensors, but its pickle is too long for {beside:,} bytes of them; {_AGAIN}"
            )
        name = opcode.name
        if name in _REFUSED and not (name == "GLOBAL" and _ALLOWED.fullmatch(str(argument))):
            shown = str(argument).replace(" ", ".") if name == "GLOBAL" else name
            raise DataError(
                f"{path} must hold tensors and plain values alone, but refers to {shown!r}, which could run code; "
                "it is not read"
            )
        # Tuples of the same tuple twice, a few dozen levels deep, take forever to hash. No pickler writes them.
        if name == "DUP" or ("GET" in name and memo[argument]):
            raise DataError(f"{path} must be a pickle as torch writes it, and repeats a tuple; {_AGAIN}")
        if "PUT" in name:
            memo[argument] = nesting[-1]
        elif name == "MARK":
            marks.append(len(nesting))
        else:
            below = opcode.stack_before
            marked = pickletools.markobject in below
            start = marks.pop() if marked else len(nesting) - len(below)
            level = 1 + max(nesting[start:], default=0) if "TUPLE" in name else 0
            if level > _DEEPEST_TUPLE:  # hashing one of many levels overflows the stack of the process
                raise DataError(f"{path} must nest at most {_DEEPEST_TUPLE} tuples, and nests more; {_AGAIN}")
            del nesting[start - (below.index(pickletools.markobject) if marked else 0) :]
            nesting += [level] * len(opcode.stack_after)


_REFUSED = frozenset({
    "GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "FROZENSET", "MEMOIZE",
})  # fmt: skip
"""Opcodes that import functions and classes, and those of protocols that torch does not write."""


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
        shard = _unpickled(path)
        if not isinstance(shard, dict) or not all(isinstance(shard.get(key), list) for key in _LISTS):
            raise DataError(f"{path} must hold lists of latents and conditionings, and does not; {_AGAIN}")
        return cls(path, shard, path.stat().st_size)

    def latents(self) -> list[LatentBatch]:
        batches = []
        for found in self.lists["latents"]:
            if not isinstance(found, dict):
                raise DataError(f"{self.path} must hold tensors as latents, and does not; {_AGAIN}")
            self._ignore(found, _LATENT_KEYS)
            downscale = found.get("downscale_ratio_spacial")
            known = type(downscale) is int and 0 < downscale < 1000
            batches.append(LatentBatch(self._tensor(found.get("samples"), "latents"), downscale if known else None))
        return batches

    def conditionings(self) -> list[list[Conditioning]]:
        entries = self.lists["conditioning"]
        if not all(isinstance(one, list) for one in entries):
            raise DataError(f"{self.path} must hold lists of conditionings, and does not; {_AGAIN}")
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
            raise DataError(f"{self.path} must hold conditionings as pairs of tensor and options; {_AGAIN}")
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
        weights = torch.ones(ids.shape) if (given := options.get(_WEIGHTS)) is None else self._tensor(given, _WEIGHTS)
        are_tokens = ids.dtype in (torch.int32, torch.int64) and ids.ndim == 1 and ids.numel() > 0
        are_tokens = are_tokens and ids.shape == weights.shape
        if not are_tokens or int(ids.min()) < 0 or int(ids.max()) >= _VOCABULARY or not weights.isfinite().all():
            raise DataError(
                f"{self.path} must hold {_IDS} from 0 to {_VOCABULARY - 1} and as many finite {_WEIGHTS}, and does "
                f"not; {_AGAIN}"
            )
        return {_IDS: ids.long().expand(batch, -1), _WEIGHTS: weights.float().expand(batch, -1)}

    def _tensor(self, found: Any, name: str) -> Tensor:
        if type(found) is not Tensor or not found.ndim:
            raise DataError(f"{name} in {self.path} must be a tensor, got {type(found).__name__}; {_AGAIN}")
        if id(found) not in self.tensors:
            self.tensors[id(found)] = found.detach()
            self.budget -= found.numel() * found.element_size()
        if self.budget < 0:
            raise DataError(f"{self.path} must hold the tensors that it announces, and is too small; {_AGAIN}")
        return self.tensors[id(found)]

    def _number(self, options: dict[Any, Any], name: str, default: float) -> float:
        found = options.get(name, default)
        if type(found) not in (int, float) or not abs(found) <= 1e6:
            raise DataError(f"{name} in {self.path} must be a number up to 10⁶, got {type(found).__name__}; {_AGAIN}")
        return float(found)

    def _ignore(self, found: dict[Any, Any], known: frozenset[str]) -> None:
        self.ignored.update(dict.fromkeys(key for key in found if isinstance(key, str) and key not in known))
