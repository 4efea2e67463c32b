"""Single-file checkpoints in the original layout, and files of tensors: safetensors and GGUF.

Tensors lie on the memory-mapped file, in the file's dtype: reading them costs no memory until they are used. Families
recognise files by names and shapes; diffusers' detection takes every unknown file for Stable Diffusion 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.quantization import Packed
from lorasmith.families.files.gguf import GgufFile, is_gguf
from lorasmith.families.files.packed_weights import PackedWeights
from lorasmith.formats.container import read_safetensors


class TensorFile(Protocol):
    """A checked file; tensors are read by `read`.

    Attributes:
        shapes: of the tensors that are weights, by name, in the file's order.
        stored: number format (`bf16`, `Q4_K`) and size in bytes of the same tensors, without their scales.
        metadata: text entries of the header.
    """

    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, tuple[str, int]]
    metadata: Mapping[str, str]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        """Tensors by name, in the file's dtype; quantized weights stay packed.

        Raises:
            ModelError: a packed weight is damaged or of an unsupported kind.
        """


def open_tensors(*paths: Path) -> TensorFile:
    """A file, or the shards of one."""
    if len(paths) == 1:
        return GgufFile(paths[0]) if is_gguf(paths[0]) else _Safetensors(paths[0])
    return _Shards([open_tensors(path) for path in paths])


class _Safetensors:
    """A safetensors file; for packed weights see `families.files.packed_weights`."""

    def __init__(self, path: Path) -> None:
        tensors, metadata = read_safetensors(path, error=ModelError)
        self.metadata: Mapping[str, str] = metadata
        self._weights = PackedWeights(path.name, tensors, metadata)
        self.shapes: Mapping[str, tuple[int, ...]] = self._weights.shapes
        self.stored: Mapping[str, tuple[str, int]] = {
            name: (self._weights.format_of(name), tensors[name].nbytes) for name in self.shapes
        }

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        return ((name, self._weights.read(name)) for name in names)


class _Shards:
    """Several files that hold one model."""

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self._file_of = {name: file for file in files for name in file.shapes}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: file.shapes[name] for name, file in self._file_of.items()}
        self.stored: Mapping[str, tuple[str, int]] = {name: file.stored[name] for name, file in self._file_of.items()}
        self.metadata: Mapping[str, str] = files[0].metadata

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        for name in names:
            yield from self._file_of[name].read([name])


ARCHITECTURE = "lorasmith.architecture"
"""Metadata key under which a checkpoint may say what shapes leave open: JSON, settings by component."""

# Full checkpoints put the denoiser under the first; other tools save it alone under one of the others, or under none.
_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "model.", "")
_LARGEST_SETTING = 65_536
LORA_MARKS = ("lora_", "lora.", "hada_w", "lokr_w", "oft_blocks")


class _Shape(tuple[int, ...]):
    """A tensor's shape. Looking up a dimension that it lacks raises ModelError."""

    def __getitem__(self, index: Any) -> Any:
        try:
            return super().__getitem__(index)
        except IndexError:
            raise ModelError(
                f"the checkpoint has a tensor of shape {tuple(self)} where its architecture has more dimensions; the "
                "file was damaged or is of an unsupported variant"
            ) from None


class Shapes(dict[str, tuple[int, ...]]):
    """Tensor shapes by name. Looking up a tensor that the file lacks, or a dimension of one, raises ModelError."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] | Iterable[tuple[str, tuple[int, ...]]] = ()) -> None:
        super().__init__((name, _Shape(shape)) for name, shape in dict(shapes).items())

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise ModelError(f"the checkpoint lacks {name}; it is incomplete or was cut short")


class OriginalCheckpoint:
    """A file in the original layout, in any precision."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open_tensors(path)
        self.shapes: Mapping[str, tuple[int, ...]] = self.file.shapes
        self.metadata: Mapping[str, str] = self.file.metadata

    @cached_property
    def denoiser_prefix(self) -> str:
        """Prefix of the denoiser's names: the first known one that more than five tensors have."""
        counts = {prefix: sum(name.startswith(prefix) for name in self.shapes) for prefix in _DENOISER_PREFIXES}
        return next((prefix for prefix in _DENOISER_PREFIXES if counts[prefix] > 5), "")

    @cached_property
    def denoiser_shapes(self) -> Shapes:
        """Shapes of the denoiser's tensors by name without prefix."""
        return self.shapes_under(self.denoiser_prefix)

    @cached_property
    def architecture(self) -> dict[str, dict[str, Any]]:
        """Settings in the file's metadata for `unet`, `vae`, `text_encoder` and `defaults`; most files have none."""
        try:
            said = parse_foreign_json(self.metadata.get(ARCHITECTURE, "{}"))
            settings = {component: dict(one) for component, one in said.items()}
            if not all(_is_plain(value) for one in settings.values() for value in one.values()):
                raise ValueError(f"settings are short texts and numbers up to {_LARGEST_SETTING:,}")
            return settings
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"{ARCHITECTURE} in the metadata of {self.path} must be settings by component in JSON; "
                "the file was damaged or edited, so get it again"
            ) from error

    def shapes_under(self, prefix: str) -> Shapes:
        """Shapes of the tensors whose names begin with `prefix`, which is cut off."""
        return Shapes(
            (name.removeprefix(prefix), shape) for name, shape in self.shapes.items() if name.startswith(prefix)
        )

    def vector(self, name: str) -> Tensor:
        """A tensor that is no matrix and so never packed, by its full name."""
        (_, tensor), *_ = self.file.read([name])
        return tensor.weight() if isinstance(tensor, Packed) else tensor

    def prefix_of(self, prefixes: Iterable[str]) -> str | None:
        """The first of `prefixes` with which a tensor's name begins, or None."""
        return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in self.shapes)), None)

    def load(self, prefix: str) -> dict[str, Tensor | Packed]:
        """Tensors whose names begin with `prefix`, which is cut off.

        They lie on the memory-mapped file, in its dtype; quantized weights stay packed.
        """
        names = [name for name in self.shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): one for name, one in self.file.read(names)}


def _is_plain(value: object) -> bool:
    """Whether a setting is a number or a text that no part of a model needs much time or memory for."""
    return len(value) <= 100 if isinstance(value, str) else isinstance(value, int | float) and value <= _LARGEST_SETTING
