"""What a diffusers pipeline says of its parts: in the JSON files of its folder, or in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import pipeline_index
from lorasmith.families.files.diffusers_folder import read_json

__all__ = ["PipelineConfigs"]

_TASKS = re.compile(r"(Img2Img|Inpaint)(?=Pipeline$)")
"""In the names of pipelines that have the same parts for other tasks."""


@dataclass(frozen=True)
class PipelineConfigs:
    """Class and configurations of a pipeline.

    Attributes:
        title: its name in messages.
        classes: names of its class and of those that this one derives from.
        of: the configuration of a part (`unet`, `scheduler`). Raises ModelError if it has no such part.
    """

    title: str
    classes: tuple[str, ...]
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
