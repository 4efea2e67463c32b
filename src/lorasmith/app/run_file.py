"""What `lorasmith train` is given, typed or in a file of settings.

    model = "sd15.safetensors"
    trigger = "sks dog"
    flip = true
    steps = 800

    [[sources]]
    path = "photos"
    repeats = 2

    [[sources]]
    path = "more/metadata.jsonl"
    weight = 0.5

The file is TOML (https://toml.io). Keys are the names of the command line's flags with underscores; paths are relative
to the file's folder. A file chooses among names: an optimizer's import path, a tracker and `follow_links` have to be
typed.

The `run.json` of a run gives the arguments of that run; where it was, and what came of it, is ignored. It may be a
stranger's, so what it names follows the rules of `recorded_run`.
"""

from __future__ import annotations

import codecs
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lorasmith.app.folder_source import FolderSource, changed
from lorasmith.app.recorded_run import PATHS_OF_SETTINGS, Rights, check_links, check_named_files
from lorasmith.core.errors import OptionError
from lorasmith.core.files import read_regular
from lorasmith.core.options import config_from, options_of
from lorasmith.core.registry import nearest
from lorasmith.core.typed_json import typed
from lorasmith.data.data_config import DataConfig
from lorasmith.data.sources import ImageSource
from lorasmith.training.config import NONE_LORA, TrainConfig, settings_from_file
from lorasmith.training.runs.records import parsed_record

__all__ = ["SETTINGS", "RunFile", "arguments_in", "parsed_toml", "read_run_file"]

SETTINGS = {**options_of(DataConfig), **options_of(TrainConfig)}
"""Declarations of the settings that a file can have, by name."""

_MOST_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """The arguments of a run; each may be missing.

    Attributes:
        sources: the images.
        model, low_noise_model, text_encoders, vae, name, output, validation, device: as for `lorasmith train`.
        settings: of data and training, by name.
    """

    sources: tuple[ImageSource, ...] = ()
    model: str | None = None
    low_noise_model: str | None = None
    text_encoders: tuple[str, ...] = ()
    vae: str | None = None
    name: str | None = None
    output: str | None = None
    validation: str | None = None
    device: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def completed(self, other: RunFile) -> RunFile:
        """The arguments, with those of `other` where they are missing."""
        missing = {name: value for name, value in vars(other).items() if not getattr(self, name)}
        return replace(self, **{**missing, "settings": {**other.settings, **self.settings}})

    def without(self, other: RunFile) -> RunFile:
        """The arguments that `completed` takes of this file, if those of `other` are typed."""
        own = {name: value for name, value in vars(self).items() if not getattr(other, name)}
        settings = {name: value for name, value in self.settings.items() if name not in other.settings}
        return RunFile(**{**own, "settings": settings})

    def named_files(self) -> Iterator[tuple[str, str | None]]:
        """What each file is that the arguments name, and its path."""
        yield "model", self.model
        yield "second expert", self.low_noise_model
        yield from (("text encoder", one) for one in self.text_encoders)
        yield "autoencoder", self.vae
        yield from (("images", one.path) for one in self.sources)
        yield "held-out images", self.validation
        yield from ((name, self.settings.get(name)) for name in PATHS_OF_SETTINGS)

    def source(self, model: str) -> FolderSource:
        """The source of the run, with a model. Raises OptionError without images, and for settings out of range."""
        if not self.sources:
            raise OptionError("a run needs images, got no folder of them; type it, or name it in --config")
        return FolderSource.of(
            self.sources,
            model,
            name=self.name,
            data=config_from(DataConfig, self._settings_of(DataConfig)),
            validation=None if self.validation is None else Path(self.validation),
            device=self.device,
            text_encoders=self.text_encoders,
            vae=self.vae,
        )

    def train_config(self, typed_settings: Mapping[str, Any]) -> TrainConfig:
        """The settings of training. Raises OptionError as `settings_from_file`.

        Args:
            typed_settings: those that were typed: an import path of an optimizer and a tracker must be among them.
        """
        optimizer, track = typed_settings.get("optimizer"), typed_settings.get("track")
        return settings_from_file(
            self._settings_of(TrainConfig),
            optimizers=() if optimizer is None else (optimizer,),
            track=track,
            allowing="--optimizer",
        )

    def _settings_of(self, config: type) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if name in options_of(config)}


def read_run_file(path: Path, *, typed_first: RunFile | None = None, rights: Rights = Rights()) -> RunFile:  # noqa: B008 - immutable
    """The arguments in a file, with paths made absolute.

    Args:
        path: a file of settings in TOML, or the record of a run: `run.json`, or other JSON that starts with a brace.
        typed_first: arguments that come before those of the file.
        rights: what the record of a run may name besides files in the current folder.

    Raises:
        OptionError: the file cannot be read, is neither of the two, has an unknown key or a value of another type, or
            is a record that names more than it may.
    """
    try:
        content = read_regular(path)
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if path.suffix.lower() == ".json" or content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        found = _of_record(path, content)
        left = found if typed_first is None else found.without(typed_first)
        check_named_files(left.named_files(), path, rights, instead="the folder of images, --model and the like")
        check_links(left.settings.get("follow_links"), path, rights)
        return found
    return arguments_in(parsed_toml(path, content), path)


def parsed_toml(path: Path, content: bytes) -> dict[str, Any]:
    """The content of a file of settings as TOML values. Raises OptionError if it is too large, or no TOML."""
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        return tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} must be TOML, such as steps = 500, but {error}; correct that line") from error


def arguments_in(found: Mapping[str, Any], path: Path) -> RunFile:
    """The arguments of a run by the values in a file of settings, with paths made absolute.

    Args:
        found: values by key.
        path: of the file; paths in it are relative to its folder.

    Raises:
        OptionError: a key is unknown, or a value of another type.
    """
    own = [one.name for one in fields(RunFile) if one.name != "settings"]
    for key in found:
        if key not in own and key not in SETTINGS:
            known = [*own, *SETTINGS]
            raise OptionError(
                f"{path} has an unknown key {key!r}{nearest(str(key), known)}; known are {', '.join(known)}"
            )
    if found.get("follow_links"):
        raise OptionError(f"{path} may not have follow_links, as its folders may be a stranger's; type --follow-links")
    try:
        given = typed(
            {
                **{key: found[key] for key in own if key in found},
                "sources": [one if isinstance(one, dict) else {"path": one} for one in _listed(found.get("sources"))],
                "text_encoders": _listed(found.get("text_encoders")),
                "settings": {key: value for key, value in found.items() if key in SETTINGS},
            },
            RunFile,
        )
    except ValueError as error:
        raise OptionError(f"{path}: {error}; correct it") from error
    return _absolute(given, path.resolve().parent)


def _of_record(path: Path, content: bytes) -> RunFile:
    """The arguments of a run by its record."""
    try:
        record = parsed_record(content.removeprefix(codecs.BOM_UTF8))
        if record.source.get("command") != "train":
            raise ValueError("was not made by lorasmith train" if record.source else "has no source of a run")
        source = FolderSource.from_record(record.source)
    except ValueError as error:
        raise OptionError(
            f"{path} must be the run.json of a run by lorasmith train, but {error}; name another, or settings in TOML"
        ) from error
    known = ("command", "folder", "data", *(one.name for one in fields(FolderSource)), *options_of(DataConfig))
    unknown = [name for name in record.source if name not in known]
    unknown += [name for name in record.asked if name not in options_of(TrainConfig)]
    if unknown:
        raise OptionError(
            f"{path} has settings of another version of Lorasmith, {', '.join(unknown)}; train with that version, or "
            "remove them"
        )
    own = {one.name: getattr(source, one.name) for one in fields(FolderSource) if one.name != "data"}
    return RunFile(**own, settings={**changed(source.data), **record.asked})


def _absolute(given: RunFile, folder: Path) -> RunFile:
    """The arguments with their paths relative to a folder made absolute."""

    def inside(path: str) -> str:
        return str(folder / path)

    def file(path: str) -> str:  # a hub id or a built-in name is no path
        return inside(path) if (folder / path).exists() else path

    settings = {
        key: inside(value) if key in PATHS_OF_SETTINGS and isinstance(value, str) and value != NONE_LORA else value
        for key, value in given.settings.items()
    }
    return replace(
        given,
        sources=tuple(replace(one, path=inside(one.path)) for one in given.sources),
        model=given.model and file(given.model),
        low_noise_model=given.low_noise_model and file(given.low_noise_model),
        text_encoders=tuple(map(file, given.text_encoders)),
        vae=given.vae and file(given.vae),
        output=given.output and inside(given.output),
        validation=given.validation and inside(given.validation),
        settings=settings,
    )


def _listed(value: Any) -> list[Any]:
    """A list of values, of which there may be none or a single one without a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
