"""Files of tensors (safetensors and GGUF), single-file checkpoints in the original layout, and diffusers' pipelines.

Tensors lie on the memory-mapped file, in the file's dtype: reading them costs no memory until they are used. Families
recognise files by names and shapes; diffusers' detection takes every unknown file for Stable Diffusion 1. A pipeline is
a folder with a subfolder for each part, or one that a program has loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.files import read_regular
from lorasmith.core.folders import pipeline_index
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.quantization import Packed
from lorasmith.families.files.gguf import GgufFile, is_gguf
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.files.packed_weights import PackedWeights
from lorasmith.formats.container import read_safetensors


class TensorFile(Protocol):
    """A checked file; tensors are read by `read`."""

    shapes: Mapping[str, tuple[int, ...]]  # of the tensors that are weights, by name, in the file's order
    # number format (`bf16`, `Q4_K`) and size in bytes of the same tensors, without their scales
    stored: Mapping[str, tuple[str, int]]
    metadata: Mapping[str, str]  # text entries of the header

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        """Tensors by name, in the file's dtype; quantized weights stay packed.

        Raises ModelError if a packed weight is damaged or of an unsupported kind.
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
        empty = tensors.empty()
        self._weights = PackedWeights(path.name, tensors, metadata, empty)
        self.shapes: Mapping[str, tuple[int, ...]] = self._weights.shapes
        self.stored: Mapping[str, tuple[str, int]] = {
            name: (self._weights.format_of(name), empty[name].nbytes) for name in self.shapes
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


class CheckpointShapes(dict[str, tuple[int, ...]]):
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
    def denoiser_shapes(self) -> CheckpointShapes:
        """Shapes of the denoiser's tensors by name without prefix."""
        return self.shapes_under(self.denoiser_prefix)

    @cached_property
    def architecture(self) -> dict[str, dict[str, Any]]:
        """Settings in the file's metadata for `unet`, `vae`, `text_encoder` and `defaults`; most files have none."""
        try:
            content = parse_foreign_json(self.metadata.get(ARCHITECTURE, "{}"))
            settings = {component: dict(settings) for component, settings in content.items()}
            if not all(_is_plain(value) for setting in settings.values() for value in setting.values()):
                raise ValueError(f"settings are short texts and numbers up to {_LARGEST_SETTING:,}")
            return settings
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"{ARCHITECTURE} in the metadata of {self.path} must be settings by component in JSON; "
                "the file was damaged or edited, so get it again"
            ) from error

    def shapes_under(self, prefix: str) -> CheckpointShapes:
        """Shapes of the tensors whose names begin with `prefix`, which is cut off."""
        return CheckpointShapes(
            (name.removeprefix(prefix), shape) for name, shape in self.shapes.items() if name.startswith(prefix)
        )

    def vector(self, name: str) -> Tensor:
        """A tensor that is not a matrix and so never packed, by its full name."""
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
        return {name.removeprefix(prefix): tensor for name, tensor in self.file.read(names)}


def _is_plain(value: object) -> bool:
    """Whether a setting is a number or a text that no part of a model needs much time or memory for."""
    return len(value) <= 100 if isinstance(value, str) else isinstance(value, int | float) and value <= _LARGEST_SETTING


def folder_source(folder: Path) -> PartSource:
    """One part of a diffusers model: its tensors, on the memory-mapped files, and its configuration."""
    file, config = open_tensors(*weight_files(folder)), folder / "config.json"
    tensors = dict(file.read(file.shapes))
    if not config.is_file():
        raise ModelError(f"{folder} must hold a config.json but does not; it is incomplete, so get it again")
    return PartSource(str(folder), tensors, config=read_json(config))


def weight_files(folder: Path) -> list[Path]:
    """The weights of one part of a diffusers folder: one file, or the shards that its index lists."""
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            found = list(places.values()) if isinstance(places, dict) else []
            names = sorted({name for name in found if isinstance(name, str) and Path(name).name == name})
            if not names or len(names) < len(set(map(str, found))):
                raise ModelError(f"{index} must list files beside it; it was damaged or edited, so get it again")
            return [folder / name for name in names]
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    raise ModelError(f"{folder} must hold its weights as safetensors and does not; get that version of the model")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError if the file cannot be read or holds none."""
    try:
        content = parse_foreign_json(read_regular(file), finite=False)
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); get the model again") from error
    except ValueError as error:
        raise ModelError(f"{file} {error}; get the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object but does not; get the model again")
    return content


_TASKS = re.compile(r"(Img2Img|Inpaint)(?=Pipeline$)")
"""In the names of pipelines that have the same parts for other tasks."""


@dataclass(frozen=True)
class PipelineConfigs:
    """Class and configurations of a pipeline."""

    title: str  # for messages
    classes: tuple[str, ...]  # names of its class and of those that this one derives from
    # the configuration of a part (`unet`, `scheduler`). Raises ModelError if it has no such part.
    of: Callable[[str], Mapping[str, Any]]

    @classmethod
    def of_folder(cls, folder: Path) -> PipelineConfigs:
        """Those of a diffusers folder, read when they are needed. Raises ModelError if it is none."""
        index = pipeline_index(folder)
        if index is None:
            raise ModelError(
                f"{folder} is not a diffusers model (it has no model_index.json); "
                "give the folder that holds it, or a .safetensors file"
            )
        name = str(read_json(index).get("_class_name"))
        return cls(folder.name, (name,), partial(_config_in, folder))

    @classmethod
    def of_pipeline(cls, pipeline: Any, title: str) -> PipelineConfigs:
        """Those of a loaded pipeline, whatever its task is."""
        names = [kind.__name__ for kind in type(pipeline).__mro__]
        names += [_TASKS.sub("", name) for name in names]
        return cls(title, tuple(dict.fromkeys(names)), partial(_config_of, pipeline, title))


def _config_in(folder: Path, part: str) -> Mapping[str, Any]:
    if not (folder / part).is_dir():
        raise ModelError(f"{folder} must hold a folder {part} but does not; it is incomplete, so get it again")
    return read_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))


def _config_of(pipeline: Any, title: str, part: str) -> Mapping[str, Any]:
    config = getattr(getattr(pipeline, part, None), "config", None)
    if config is None:
        raise ModelError(f"{title} must have a {part} but has none; load it with all of its parts")
    return dict(config)


_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def source_of_module(module: nn.Module, title: str, part: str) -> PartSource:
    """The tensors of a loaded module, uncopied, and its configuration."""
    module = getattr(module, "_orig_mod", module)  # of what torch.compile wraps
    if (reason := next(_obstacles(module), None)) is not None:
        raise ModelError(f"the {part} of {title} must have plain weights in memory, but {reason}")
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    config: Any = module.config
    return PartSource(
        f"the {part} of {title}", tensors, config=config.to_dict() if hasattr(config, "to_dict") else dict(config)
    )


def _obstacles(module: nn.Module) -> Iterator[str]:
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    if any(".base_layer." in name for name in parameters):
        yield "LoRAs are loaded on it; unload them (pipe.unload_lora_weights()), and load them as lorasmith.Lora"
    if any(parameter.is_meta for parameter in parameters.values()):
        yield "they were moved away by sequential offloading; load the pipeline without it"
    if getattr(module, "hf_quantizer", None) is not None or any(
        type(parameter) is not nn.Parameter or parameter.dtype not in _PLAIN for parameter in parameters.values()
    ):
        yield "they are quantized; load them in bf16 or fp16, and quantize in training (quantization=...)"
