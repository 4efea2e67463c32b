"""The inputs of a run on a folder of images, and the command that repeats it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorasmith.app.command_lines import arguments_for, positional
from lorasmith.core.errors import OptionError
from lorasmith.core.folders import file_stem
from lorasmith.core.options import options_of
from lorasmith.core.typed_json import typed
from lorasmith.families.model_search import ModelFiles
from lorasmith.training.config import TrainConfig
from lorasmith.training.runs.records import check_title

__all__ = ["FolderSource", "absolute"]

_LARGEST_SIDE = 4096  # of pictures, which are scaled up; a picture of this size takes gigabytes to encode
_LONGEST_TRIGGER = 1000


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """The inputs of a run on a folder besides its settings, stored in `run.json` and the LoRA to repeat the run.

    Attributes:
        folder: of the images, absolute.
        model: base model: a path, absolute, a hub id or a built-in name.
        name: of the LoRA.
        trigger: phrase put in front of captions that lack it.
        resolution: side in pixels of the square whose area pictures are scaled to; None for the model's own.
        validation: folder of held-out images, absolute.
        device: where to train; None for the first GPU, or the CPU.
        text_encoders, vae: files of the model's parts, absolute.
    """

    folder: str
    model: str
    name: str
    trigger: str = ""
    resolution: int | None = None
    validation: str | None = None
    device: str | None = None
    text_encoders: tuple[str, ...] = ()
    vae: str | None = None

    @classmethod
    def of(
        cls,
        folder: Path,
        model: str,
        *,
        name: str | None = None,
        trigger: str = "",
        resolution: int | None = None,
        validation: Path | None = None,
        device: str | None = None,
        text_encoders: Sequence[str] = (),
        vae: str | None = None,
    ) -> FolderSource:
        """The source with absolute paths.

        Args:
            folder, model, trigger, resolution, validation, device, text_encoders, vae: as the attributes; paths may be
                relative.
            name: of the LoRA; that of the folder if None.
        """
        return cls(
            folder=str(folder.resolve()),
            model=absolute(model),
            name=name or file_stem(folder.resolve().name),
            trigger=trigger,
            resolution=resolution,
            validation=None if validation is None else str(validation.resolve()),
            device=device,
            text_encoders=tuple(absolute(one) for one in text_encoders),
            vae=vae and absolute(vae),
        )

    def check(self) -> None:
        """Raise OptionError if name, trigger or resolution cannot be used."""
        check_title(self.name)
        if len(self.trigger) > _LONGEST_TRIGGER:
            raise OptionError(
                f"trigger must have at most {_LONGEST_TRIGGER:,} characters, got {len(self.trigger):,}; use a phrase"
            )
        if self.resolution is not None and not 1 <= self.resolution <= _LARGEST_SIDE:
            raise OptionError(f"resolution must be between 1 and {_LARGEST_SIDE:,} pixels, got {self.resolution}")

    @property
    def files(self) -> ModelFiles:
        """The files of the model."""
        return ModelFiles(self.model, tuple(self.text_encoders), self.vae)

    def with_files(self, files: ModelFiles) -> FolderSource:
        """The source with other files of the model, made absolute."""
        return replace(
            self,
            model=absolute(files.model),
            text_encoders=tuple(map(absolute, files.text_encoders)),
            vae=files.vae and absolute(files.vae),
        )

    def command(self, config: TrainConfig) -> list[str]:
        """The command that repeats a run of `config` from any folder."""
        own: dict[str, Any] = {
            "model": self.model,
            "text_encoder": self.text_encoders,
            "vae": self.vae,
            "name": None if self.name == Path(self.folder).name else self.name,
            "trigger": self.trigger,
            "resolution": self.resolution,
            "validation": self.validation,
            "device": self.device,
        }
        chosen = {one: getattr(config, one) for one in options_of(TrainConfig) if not config.is_default(one)}
        given = {option: value for option, value in own.items() if value} | chosen
        return ["lorasmith", "train", positional(self.folder), *arguments_for(given)]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FolderSource:
        """The source in a record. Raises ValueError if it is of another command, damaged or lacks images or model."""
        if record.get("command") != "train":
            raise ValueError("source.command must be train")
        return typed(record, cls, "source")

    def to_record(self) -> dict[str, Any]:
        """The source as JSON values, for `run.json`."""
        return {"command": "train", **asdict(self)}


def absolute(path: str) -> str:
    """The absolute path, or the text unchanged if it is not a path, such as a hub id."""
    return str(Path(path).resolve()) if os.path.exists(path) else path  # noqa: PTH110 - for any text
