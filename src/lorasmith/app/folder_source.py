"""The inputs of a run on images, and the command that repeats it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lorasmith.app.command_lines import arguments_for, positional
from lorasmith.core.errors import OptionError
from lorasmith.core.folders import file_stem
from lorasmith.core.options import config_from, options_of
from lorasmith.core.typed_json import typed
from lorasmith.data.data_config import DATA_PATHS, DataConfig
from lorasmith.data.sources import ImageSource
from lorasmith.families.model_search import ModelFiles
from lorasmith.training.config import TrainConfig

__all__ = ["FolderSource", "absolute", "changed"]


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """The inputs of a run on images besides its settings, stored in `run.json` and the LoRA to repeat the run.

    Attributes:
        sources: of the images, with absolute paths; the run is named after the first one.
        model: base model: a path, absolute, a hub id or a built-in name.
        name: of the LoRA.
        data: how images and captions become samples; its paths are absolute.
        validation: folder of held-out images, absolute.
        device: where to train; None for the first GPU, or the CPU.
        text_encoders, vae: files of the model's parts, absolute.
    """

    sources: tuple[ImageSource, ...]
    model: str
    name: str
    data: DataConfig = field(default_factory=DataConfig)
    validation: str | None = None
    device: str | None = None
    text_encoders: tuple[str, ...] = ()
    vae: str | None = None

    @classmethod
    def of(
        cls,
        images: Path | Sequence[ImageSource],
        model: str,
        *,
        name: str | None = None,
        data: DataConfig | None = None,
        validation: Path | None = None,
        device: str | None = None,
        text_encoders: Sequence[str] = (),
        vae: str | None = None,
    ) -> FolderSource:
        """The source with absolute paths.

        Args:
            images: their folder, or several sources.
            model, data, validation, device, text_encoders, vae: as the attributes; paths may be relative.
            name: of the LoRA; that of the first folder if None.
        """
        data = data or DataConfig()
        sources = [ImageSource(str(images))] if isinstance(images, Path) else images
        sources = [replace(one, path=str(Path(one.path).resolve())) for one in sources]
        named: dict[str, Any] = {one: str(Path(path).resolve()) for one in DATA_PATHS if (path := getattr(data, one))}
        return cls(
            sources=tuple(sources),
            model=absolute(model),
            name=name or _name_of(sources[0]),
            data=replace(data, **named),
            validation=None if validation is None else str(validation.resolve()),
            device=device,
            text_encoders=tuple(absolute(one) for one in text_encoders),
            vae=vae and absolute(vae),
        )

    @property
    def folder(self) -> str:
        """The first source's path."""
        return self.sources[0].path

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
        is_plain = self.sources[0] == ImageSource(self.folder)
        own: dict[str, Any] = {
            "model": self.model,
            "text_encoder": self.text_encoders,
            "vae": self.vae,
            "name": None if self.name == _name_of(self.sources[0]) else self.name,
            "also": tuple(one.text for one in (self.sources[1:] if is_plain else self.sources)),
            "validation": self.validation,
            "device": self.device,
        }
        given = {option: value for option, value in own.items() if value} | changed(self.data) | changed(config)
        return ["lorasmith", "train", *([positional(self.folder)] if is_plain else []), *arguments_for(given)]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FolderSource:
        """The source in a record. Raises ValueError if it is of another command, damaged or lacks images or model."""
        if record.get("command") != "train":
            raise ValueError("source.command must be train")
        data = {name: value for name, value in record.items() if name in options_of(DataConfig)}
        own = {name: value for name, value in record.items() if name not in data and name != "data"}
        if "folder" in own:
            own = {"sources": [{"path": own["folder"]}], **own}
        try:
            source = typed(own, cls, "source")
            return replace(source, data=config_from(DataConfig, data))
        except OptionError as error:
            raise ValueError(f"source.{error}") from error

    def to_record(self) -> dict[str, Any]:
        """The source as JSON values, for `run.json`: its own, and the settings of the data that are no defaults."""
        own = {name: value for name, value in asdict(self).items() if name != "data"}
        if self.sources == (ImageSource(self.folder),):
            own = {"folder": self.folder, **{name: value for name, value in own.items() if name != "sources"}}
        return {"command": "train", **own, **changed(self.data)}


def changed(config: DataConfig | TrainConfig) -> dict[str, Any]:
    """The settings that have not their default values."""
    return {name: getattr(config, name) for name in options_of(type(config)) if not config.is_default(name)}


def _name_of(source: ImageSource) -> str:
    path = Path(source.path)
    return file_stem(path.parent.name if path.suffix and path.is_file() else path.name)


def absolute(path: str) -> str:
    """The absolute path, or the text unchanged if it is not a path, such as a hub id."""
    return str(Path(path).resolve()) if os.path.exists(path) else path  # noqa: PTH110 - for any text
