"""diffusers' pipelines: a folder with a subfolder for each part, or one that a program has loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.errors import ModelError
from lorasmith.core.files import read_regular
from lorasmith.core.folders import pipeline_index
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.families.files.checkpoint import Shapes, TensorFile, open_tensors
from lorasmith.families.files.original_weights import PartSource


class PartFolder:
    """One part of a diffusers model, read on access."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its configuration. Raises ModelError if it is missing or no JSON object."""
        file = self.path / "config.json"
        if not file.is_file():
            raise ModelError(f"{self.path} must hold a config.json but does not; it is incomplete, so get it again")
        return read_json(file)

    @property
    def shapes(self) -> Shapes:
        """Shapes of its tensors by name."""
        return Shapes(self._file.shapes)

    def source(self) -> PartSource:
        """Its tensors, on the memory-mapped files and in their dtype, and its configuration."""
        return PartSource(str(self.path), dict(self._file.read(self._file.shapes)), config=self.config)

    @cached_property
    def _file(self) -> TensorFile:
        return open_tensors(*weight_files(self.path))


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
                f"{folder} is no diffusers model (it has no model_index.json); "
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
    if any(one.is_meta for one in parameters.values()):
        yield "they were moved away by sequential offloading; load the pipeline without it"
    if getattr(module, "hf_quantizer", None) is not None or any(
        type(one) is not nn.Parameter or one.dtype not in _PLAIN for one in parameters.values()
    ):
        yield "they are quantized; load them in bf16 or fp16, and quantize in training (quantization=...)"
