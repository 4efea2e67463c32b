"""The spec of a run on images: images, model, settings, name and place.

Command line, file of settings, row of a sweep, request of the page and record of a run are parsed into a `RunSpec`, and
written from one. Nothing here imports torch. A file of settings:

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

It is TOML (https://toml.io). Keys are the names of the command line's flags with underscores; paths are relative to the
file's folder. A file chooses among names: the import path of an optimizer, a schedule, a loss or timesteps, a tracker
and `follow_links` have to be typed.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.core.files import read_regular
from lorasmith.core.folders import Folders, file_stem
from lorasmith.core.options import Option, changed, config_from, options_of
from lorasmith.core.registry import nearest
from lorasmith.core.stores import is_url
from lorasmith.core.typed_json import typed
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.families.locating import BUILT_IN, ModelFiles
from lorasmith.runs.command_lines import arguments_for, positional
from lorasmith.training.adapter_settings import NONE_LORA, lora_settings
from lorasmith.training.config import TrainConfig, names_alone
from lorasmith.training.section import recorded_consequences

SETTINGS = {**options_of(DataConfig), **options_of(TrainConfig)}  # declarations of all settings of a run, by name

SETTING_PATHS = tuple(name for name, declared in SETTINGS.items() if declared.is_path)  # names of those that are paths

NO_PRESET = "none"  # settings that nobody gives have their declared defaults

PRESET = Option(
    name="preset",
    type=str,
    default="",
    choices=("quick", "balanced", "thorough", NO_PRESET),
    help="How long to train, and the recipe for the number of pictures, their kind and the model. Settings that you "
    "give come first, and none leaves the others at their defaults. Default: balanced.",
)
KIND = Option(
    name="kind",
    type=str,
    default="",
    choices=("subject", "style"),
    help="What the pictures teach, which the recipe follows. Default: guessed from trigger and captions.",
)

_MOST_BYTES = 2**20  # of a file of settings

_RECORDED = ("sources", "model", "name", "validation", "device", "text_encoders", "vae", "edit")
"""What a record's `source` holds besides settings of data; the first three always."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run on images. What is missing may be completed by another spec, or has its default."""

    sources: tuple[ImageSource, ...] = ()  # the run is named after the first one
    model: str = ""  # base model: path, hub id or built-in name
    low_noise_model: str | None = None  # second expert of a model of two, if both are trained
    text_encoders: tuple[str, ...] = ()
    vae: str | None = None
    edit: str | None = None  # edit variant that the model is
    name: str = ""  # of the LoRA; that of the first folder if empty
    output: str | None = None  # folder of the run
    validation: str | None = None  # folder of held-out images
    device: str | None = None  # the first GPU, or the CPU, if None
    preset: str = ""  # whose recipe completes the settings when the run is planned (`presets`); none if empty
    kind: str = ""  # subject or style, which the recipe follows; guessed from captions if empty
    settings: Mapping[str, Any] = field(default_factory=dict)  # of data and training, by name

    def __post_init__(self) -> None:
        for declared in (PRESET, KIND):
            if value := getattr(self, declared.name):
                object.__setattr__(self, declared.name, declared.check(value))

    @cached_property
    def data(self) -> DataConfig:
        """The settings of data. OptionError if one is out of its range."""
        config: DataConfig = config_from(DataConfig, settings_of_data(self.settings))
        return config

    @cached_property
    def config(self) -> TrainConfig:
        """The settings of training. OptionError if one is unknown or out of its range."""
        others = {name: value for name, value in self.settings.items() if name not in options_of(DataConfig)}
        config: TrainConfig = config_from(TrainConfig, others)
        return config

    @property
    def folder(self) -> str:
        """The first source's path."""
        return self.sources[0].path

    @property
    def files(self) -> ModelFiles:
        return ModelFiles(self.model, self.text_encoders, self.vae, self.edit)

    def with_files(self, files: ModelFiles) -> RunSpec:
        """The spec with other files of the model, made absolute."""
        return replace(
            self,
            model=absolute(files.model),
            text_encoders=tuple(map(absolute, files.text_encoders)),
            vae=files.vae and absolute(files.vae),
        )

    def with_settings(self, **settings: Any) -> RunSpec:
        return replace(self, settings={**self.settings, **settings})

    def completed(self, other: RunSpec) -> RunSpec:
        """The spec, with the values of `other` where its own are missing."""
        missing = {field.name: getattr(other, field.name) for field in fields(self) if not getattr(self, field.name)}
        return replace(self, **{**missing, "settings": {**other.settings, **self.settings}})

    def trusted(
        self, *, imports: Collection[str] = (), track: str | None = None, allowing: str | None = None
    ) -> RunSpec:
        """The spec of a file, whose settings choose among known names alone; see `names_alone`."""
        settings = names_alone(self.settings, imports=imports, track=track, allowing=allowing)
        return replace(self, settings=settings)

    def requested(self, folders: Folders) -> RunSpec:
        """The spec of a request, whose settings choose among known names and name LoRAs of `models/loras`. OptionError
        if one is unknown, out of its range or not for requests, LoraError for an unknown LoRA.
        """
        settings = {name: value for name, value in self.settings.items() if value is not None}
        for name, value in settings.items():
            if name in SETTINGS and SETTINGS[name].door == "typed" and value not in ("none", False):
                raise OptionError(f"{name} is not for requests, got {value!r}; type it on the command line")
        loras = {name: settings[name] for name in lora_settings() if settings.get(name) not in (None, NONE_LORA)}
        settings |= {name: str(folders.find("loras", str(value))) for name, value in loras.items()}
        spec = replace(self, settings=settings | ({"follow_links": True} if folders.follow_links else {}))
        _ = spec.data, spec.trusted().config  # checked here
        return spec

    def resolved(self) -> RunSpec:
        """The spec with a name and absolute paths. OptionError without images or model."""
        if not self.sources:
            raise OptionError("a run needs images, got no folder of them; type it, or name it in --config")
        if not self.model:
            raise OptionError("a run needs a model, got none; name a file, a diffusers folder or a hub id")
        if (self.data.controls == "opposite") != self.config.consequences().are_pairs:
            raise OptionError(
                f"pairs and controls opposite belong together, got pairs {self.config.pairs} and controls "
                f"{self.data.controls}; leave controls out and choose pairs"
            )
        paths = {name: _each(resolved, self.settings[name]) for name in options_of(DataConfig) if self._paths_of(name)}
        return replace(
            self.with_files(self.files).with_settings(**paths),
            sources=tuple(replace(source, path=resolved(source.path)) for source in self.sources),
            name=self.name or file_stem(self.sources[0].title),
            validation=self.validation and resolved(self.validation),
            low_noise_model=self.low_noise_model and absolute(self.low_noise_model),
        )

    def named_files(self) -> Iterator[tuple[str, str | None]]:
        """(what it is, path) of each file that the spec names."""
        yield "model", self.model
        yield "second expert", self.low_noise_model
        yield from (("text encoder", encoder) for encoder in self.text_encoders)
        yield "autoencoder", self.vae
        yield from (("images", source.path) for source in self.sources)
        yield "held-out images", self.validation
        yield from ((name, path) for name in SETTING_PATHS for path in self._paths_of(name))

    def command(self) -> list[str]:
        """The command that repeats the run from any folder, its paths being absolute."""
        is_plain = self.sources[0] == ImageSource(self.folder)
        own: dict[str, Any] = {
            "model": self.model,
            "text_encoder": self.text_encoders,
            "vae": self.vae,
            "edit": self.edit,
            "name": None if self.name == file_stem(self.sources[0].title) else self.name,
            "also": tuple(source.text for source in (self.sources[1:] if is_plain else self.sources)),
            "validation": self.validation,
            "device": self.device,
            "preset": self.preset or NO_PRESET,
            "kind": self.kind,
        }
        options = {option: value for option, value in own.items() if value} | changed(self.data) | changed(self.config)
        return ["lorasmith", "train", *([positional(self.folder)] if is_plain else []), *arguments_for(options)]

    @classmethod
    def from_record(cls, source: Mapping[str, Any], asked: Mapping[str, Any]) -> RunSpec:
        """The spec in a record of `lorasmith train`, from its `source` and its settings of training, `asked`.

        ValueError if the source is of another command, damaged, or lacks images, model or name.
        """
        if source.get("command") != "train":
            raise ValueError("source.command must be train")
        arguments = {name: source[name] for name in _RECORDED if name in source}
        if "folder" in source:
            arguments = {"sources": [{"path": source["folder"]}], **arguments}
        if missing := next((name for name in _RECORDED[:3] if name not in arguments), None):
            raise ValueError(f"source.{missing} is missing")
        if stray := next((name for name in asked if name in options_of(DataConfig)), None):
            raise ValueError(f"asked.{stray} is a setting of data, which belongs in source")
        try:
            spec = typed({**arguments, "preset": NO_PRESET}, cls, "source")
            spec = spec.with_settings(**{name: source[name] for name in options_of(DataConfig) if name in source})
            spec.data  # noqa: B018 - checked here
        except OptionError as error:
            raise ValueError(f"source.{error}") from error
        return spec.with_settings(**asked)

    def to_request(self) -> dict[str, Any]:
        """The request of a job as JSON values, without what has its default."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        sources = [{"path": source.path, **changed(source)} for source in self.sources]
        own |= {"sources": sources, "settings": dict(self.settings)}
        return {name: value for name, value in own.items() if value or name == "settings"}

    def to_record(self) -> dict[str, Any]:
        """The source of the run's record as JSON values; settings of training are elsewhere in a record."""
        own = {name: getattr(self, name) for name in _RECORDED}
        if self.sources == (ImageSource(self.folder),):
            own = {"folder": self.folder, **{name: value for name, value in own.items() if name != "sources"}}
        else:
            own["sources"] = [vars(source) for source in self.sources]
        recipe = {"preset": self.preset, "kind": self.kind} if self.preset not in ("", NO_PRESET) else {}
        return {"command": "train", **own, **recipe, **changed(self.data)}

    def _paths_of(self, name: str) -> list[str]:
        value = self.settings.get(name) if name in SETTING_PATHS else None
        return [os.fspath(path) for path in _listed(value) if isinstance(path, str | os.PathLike) and path != NONE_LORA]


def settings_of_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of data among those of a run; a run on pairs has opposites in place of controls."""
    own = {name: value for name, value in settings.items() if name in options_of(DataConfig)}
    are_pairs = recorded_consequences(TrainConfig, settings).are_pairs
    return {"controls": "opposite", **own} if are_pairs else own


def read_typed(path: Path) -> bytes:
    """The content of a file that a command names. OptionError if it cannot be read."""
    try:
        return read_regular(path)
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); check the path") from error


def parsed_toml(path: Path, content: bytes) -> dict[str, Any]:
    """A file of settings as TOML values. OptionError if it is too large, or not TOML."""
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        return tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} must be TOML, such as steps = 500, but {error}; correct that line") from error


def arguments_in(content: Mapping[str, Any], path: Path) -> RunSpec:
    """The run that the values in a file of settings describe, with absolute paths. Raises OptionError."""
    own = [field.name for field in fields(RunSpec) if field.name != "settings"]
    for key in content:
        if key not in own and key not in SETTINGS:
            known = [*own, *SETTINGS]
            raise OptionError(
                f"{path} has an unknown key {key!r}{nearest(str(key), known)}; known are {', '.join(known)}"
            )
    if content.get("follow_links"):
        raise OptionError(f"{path} may not have follow_links, as its folders may be a stranger's; type --follow-links")
    try:
        spec = typed(
            {
                **{key: content[key] for key in own if key in content},
                "sources": [
                    source if isinstance(source, dict) else {"path": source}
                    for source in _listed(content.get("sources"))
                ],
                "text_encoders": _listed(content.get("text_encoders")),
                "settings": {key: value for key, value in content.items() if key in SETTINGS},
            },
            RunSpec,
        )
    except ValueError as error:
        raise OptionError(f"{path}: {error}; correct it") from error
    return _in_folder(spec, path.resolve().parent)


def absolute(path: str) -> str:
    """The absolute path, or the text unchanged if it is not a path but a hub id or the name of the built-in model."""
    is_path = path != BUILT_IN and os.path.exists(path)  # noqa: PTH110 - for any text
    return str(Path(path).resolve()) if is_path else path


def resolved(path: str) -> str:
    """The absolute path of a source, or its address."""
    return path if is_url(path) else str(Path(path).resolve())


def _in_folder(spec: RunSpec, folder: Path) -> RunSpec:
    def inside(path: str) -> str:
        return path if is_url(path) else str(folder / path)

    def file(path: str) -> str:  # a hub id or a built-in name is not a path
        return inside(path) if path != BUILT_IN and (folder / path).exists() else path

    settings = {key: _each(inside, value) if spec._paths_of(key) else value for key, value in spec.settings.items()}
    return replace(
        spec,
        sources=tuple(replace(source, path=inside(source.path)) for source in spec.sources),
        model=spec.model and file(spec.model),
        low_noise_model=spec.low_noise_model and file(spec.low_noise_model),
        text_encoders=tuple(map(file, spec.text_encoders)),
        vae=spec.vae and file(spec.vae),
        output=spec.output and inside(spec.output),
        validation=spec.validation and inside(spec.validation),
        settings=settings,
    )


def _listed(value: Any) -> list[Any]:
    """A list of values, which may be missing or a single value."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _each(change: Callable[[Any], str], value: Any) -> Any:
    """A path, or each of several, changed."""
    if isinstance(value, list | tuple):
        return tuple(_each(change, item) for item in value)
    return change(value) if isinstance(value, str | os.PathLike) else value
