"""diffusers' folders: a subfolder for each part of a model, with its configuration and its weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from lorasmith.core.errors import ModelError
from lorasmith.core.files import read_regular
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.families.files.checkpoint import Shapes
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.files.tensor_files import TensorFile, open_tensors

__all__ = ["PartFolder", "read_json", "weight_files"]


class PartFolder:
    """One part of a diffusers model, read on access.

    Args:
        path: the folder, with `config.json` and weights as safetensors.
    """

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
    """The weights of one part of a diffusers folder: one file, or the shards that its index lists.

    Raises:
        ModelError: there are none as safetensors, or the index names files outside the folder.
    """
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
