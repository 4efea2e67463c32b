"""A base model's files: the file, tensor and rows of each parameter, which is read on request.

Single files in the original layout fuse and rename the parameters of diffusers' modules. The source of each parameter
is found without reading weights: the family converts the checkpoint once with row numbers in place of weights, which
then identify the tensor and its rows.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.adapter_state import DENOISER, ModuleRef
from lorasmith.core.errors import LorasmithError, ModelError
from lorasmith.core.extras import model_packages
from lorasmith.core.pretrained import prepare_libraries
from lorasmith.core.quantization import Packed
from lorasmith.families.base import Family
from lorasmith.families.files.checkpoint import OriginalCheckpoint, PipelineConfigs, read_json, weight_files
from lorasmith.families.files.gguf import is_gguf
from lorasmith.families.files.original_weights import weights_empty
from lorasmith.families.files.packed_weights import scale_name
from lorasmith.families.loading import expert_in, family_of, model_of_checkpoint
from lorasmith.families.locating import named_path
from lorasmith.formats.container import check_safetensors, read_safetensors
from lorasmith.formats.names import ModelNames


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model: its module and its name there, `weight` or `bias`."""

    module: ModuleRef
    name: str


@dataclass(frozen=True)
class ParameterSource:
    """The source of a parameter in a safetensors file."""

    file: Path
    tensor: str
    rows: slice | Tensor | None  # of the tensor, a slice if they are consecutive, None for all of them in order
    shape: tuple[int, ...]  # the parameter's, which may differ from the rows' in dimensions of size 1


@dataclass(frozen=True)
class ModelReader:
    """A base model's files; no weights are held in memory."""

    path: Path  # the checkpoint or the diffusers folder
    family: Family
    names: ModelNames
    modules: Mapping[ModuleRef, nn.Module]  # layers without weights, for their kind and geometry
    places: Mapping[Parameter, ParameterSource]  # source of each parameter of `modules`
    _open: dict[Path, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def parameterization(self) -> str:
        """`epsilon`, `v` or `flow`."""
        if self.path.is_file():
            return self.family.diffusion(OriginalCheckpoint(self.path)).parameterization
        return self.family.diffusion_of_pipeline(PipelineConfigs.of_folder(self.path)).parameterization

    def files(self) -> set[Path]:
        return {place.file for place in self.places.values()}

    def has_numbers(self, parameter: Parameter) -> bool:
        """Whether a parameter can be read: it is there, and is not packed."""
        place = self.places.get(parameter)
        return place is not None and scale_name(place.tensor, self._tensors(place.file)) is None

    def read(self, parameter: Parameter) -> Tensor:
        """One parameter, in its own dtype and shape."""
        place = self.places[parameter]
        tensor = self.tensor(place.file, place.tensor)
        return (tensor if place.rows is None else tensor[place.rows]).reshape(place.shape)

    def tensor(self, file: Path, name: str) -> Tensor:
        """One tensor of one of the files. Raises ModelError if it is quantized with a scale."""
        tensors = self._tensors(file)
        if scale_name(name, tensors) is not None:
            raise ModelError(
                f"{name} in {file} is packed, and the tools do not compute on codes; use the bf16 or fp16 version"
            )
        return tensors[name]

    def _tensors(self, file: Path) -> Mapping[str, Tensor]:
        if file not in self._open:
            self._open[file], _ = read_safetensors(file, ModelError)
        return self._open[file]


@model_packages("a base model")
def open_model(source: str | os.PathLike[str]) -> ModelReader:
    """The files of a single-file checkpoint, a diffusers folder, an expert's folder in one, or a built-in model.

    Raises ModelError if it cannot be found, read or recognised.
    """
    path = named_path(source)
    if is_gguf(path):
        raise ModelError(
            f"{path} is a GGUF file, whose weights are codes that the tools do not compute on; use the bf16 or fp16 "
            "version of it"
        )
    return _folder(path) if path.is_dir() else _single_file(path)


class _RowNumbers(OriginalCheckpoint):
    """A checkpoint whose weights are the numbers of their rows in the whole file, without memory for them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.starts: list[int] = []
        rows = 0
        for shape in self.shapes.values():
            self.starts.append(rows)
            rows += shape[0] if shape else 1

    def load(self, prefix: str) -> dict[str, Tensor | Packed]:
        return {
            name.removeprefix(prefix): _row_numbers(shape, start)
            for (name, shape), start in zip(self.shapes.items(), self.starts, strict=True)
            if name.startswith(prefix)
        }


def _row_numbers(shape: tuple[int, ...], start: int) -> Tensor:
    """In fp64, which holds such numbers exactly and is a dtype that parameters may have; all columns share memory."""
    if not shape:
        return torch.tensor(float(start), dtype=torch.float64)
    rows = torch.arange(start, start + shape[0], dtype=torch.float64)
    return rows.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)


def _single_file(path: Path) -> ModelReader:
    checkpoint = _RowNumbers(path)
    model = model_of_checkpoint(checkpoint)
    parts = {DENOISER: model.components.denoiser, **model.components.text_encoders}
    tensors = list(checkpoint.shapes)
    places = {}
    for parameter, numbers in _parameters(parts):
        flat = numbers.detach().flatten(1) if numbers.ndim > 1 else numbers.detach().reshape(-1, 1)
        if not flat.numel() or not torch.equal(flat[:, 0], flat[:, -1]):
            continue  # transposed in the conversion, as are projections, which LoRAs do not change
        rows = flat[:, 0].long()
        index = bisect.bisect_right(checkpoint.starts, int(rows[0])) - 1
        shape = checkpoint.shapes[tensors[index]]
        rows = rows - checkpoint.starts[index]
        places[parameter] = ParameterSource(path, tensors[index], _compact(rows, shape), tuple(numbers.shape))
    return ModelReader(path=path, family=model.family, names=model.names, modules=_modules(parts), places=places)


def _compact(rows: Tensor, shape: tuple[int, ...]) -> slice | Tensor | None:
    """Row numbers in the form of `ParameterSource.rows`."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    if not torch.equal(rows, torch.arange(start, stop)):
        return rows
    return None if stop - start == (shape[0] if shape else 1) else slice(start, stop)


def _folder(folder: Path) -> ModelReader:
    folder, expert = expert_in(folder)
    family = family_of(folder)
    try:
        folders = _components(folder, family, expert or family.denoiser_folder)
        found = {part: _without_weights(folder, family, list(names)) for part, names in folders.items()}
    except LorasmithError:
        raise
    except Exception as error:  # constructors of diffusers and transformers raise many kinds for odd settings
        raise ModelError(f"{folder} cannot be read as a diffusers model: {error}; get it again") from error
    encoders = {part: module for part, module in found.items() if part != DENOISER}
    names = family.names(found[DENOISER], encoders)
    parts = {part: module for part, module in found.items() if part == DENOISER or part in names.text_encoders}
    places = {}
    for part, module in parts.items():
        held = {
            _written(part, prefix + name): (file, name)
            for subfolder, prefix in folders[part].items()
            for file in weight_files(folder / subfolder)
            for name in check_safetensors(file, ModelError).tensors
        }
        for parameter, tensor in _parameters({part: module}):
            path = parameter.module.path
            if f"{path}.{parameter.name}" in held:
                places[parameter] = ParameterSource(*held[f"{path}.{parameter.name}"], None, tuple(tensor.shape))
            elif part == DENOISER or path in names.paths(part):  # others may be tied to one that is there
                raise ModelError(
                    f"the weights in {folder / next(iter(folders[part]))} lack {path}.{parameter.name}; "
                    "they are incomplete, so get them again"
                )
    return ModelReader(folder, family, names, _modules(parts), places)


def _components(folder: Path, family: Family, main: str) -> dict[str, dict[str, str]]:
    """The parts of a diffusers folder that LoRAs are for: component → subfolder → prefix of its tensors' names."""
    for name in (main, *family.denoiser_parts):
        if not (folder / name / "config.json").is_file():
            raise ModelError(f"{folder} must hold a folder {name} but does not; it is incomplete")
    denoiser = {main: "", **{name: f"{name}." for name in family.denoiser_parts}}
    encoders = sorted(path.parent.name for path in folder.glob("text_encoder*/config.json"))
    return {DENOISER: denoiser, **{name: {name: ""} for name in encoders}}


def _without_weights(folder: Path, family: Family, subfolders: Sequence[str]) -> nn.Module:
    """A part of a diffusers folder, from its configuration, on the meta device.

    `subfolders` are one, or those of a denoiser with `Family.denoiser_parts`.
    """
    import diffusers
    import transformers

    prepare_libraries()
    config, *further = (read_json(folder / name / "config.json") for name in subfolders)
    is_denoiser = "_class_name" in config
    library, name = (diffusers, config["_class_name"]) if is_denoiser else (transformers, config["architectures"][0])
    kind: Any = getattr(library, name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{name} is not a model")
    if further:
        kind, config = family.denoiser_class(), {**config, **dict(zip(subfolders[1:], further, strict=True))}
    with weights_empty():
        model = kind.from_config(config) if is_denoiser else kind(kind.config_class.from_dict(config))
    return model.eval()  # type: ignore[no-any-return]


def _parameters(parts: Mapping[str, nn.Module]) -> Iterator[tuple[Parameter, Tensor]]:
    """Every parameter of a model, under its module's name in files."""
    for part, module in parts.items():
        for name, tensor in module.named_parameters():
            path, _, leaf = _written(part, name).rpartition(".")
            if path:
                yield Parameter(ModuleRef(part, path), leaf), tensor


def _modules(parts: Mapping[str, nn.Module]) -> dict[ModuleRef, nn.Module]:
    return {
        ModuleRef(part, _written(part, path)): module
        for part, whole in parts.items()
        for path, module in whole.to("meta").named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def _written(part: str, path: str) -> str:
    """A path in files' spelling: in CLIP's text encoders after `text_model.`, which transformers 5.6 dropped."""
    is_spelled = part == DENOISER or path.startswith(("text_model.", "encoder.block."))  # T5's blocks have no prefix
    return path if is_spelled else f"text_model.{path}"
