"""Runs in files: settings in TOML, or the record of a run.

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
typed. The `run.json` of a run gives the arguments of that run; it is untrusted, so what it names follows the rules of
`recorded_run`. Its output and results are ignored.
"""

from __future__ import annotations

import codecs
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.core.files import read_regular
from lorasmith.core.options import options_of
from lorasmith.core.registry import nearest
from lorasmith.core.typed_json import typed
from lorasmith.data.data_config import DataConfig
from lorasmith.runs.recorded_run import Rights, check_links, check_named_files
from lorasmith.runs.spec import SETTING_PATHS, SETTINGS, RunSpec
from lorasmith.training.config import NONE_LORA, TrainConfig
from lorasmith.training.storage.records import parsed_record

_MOST_BYTES = 2**20


def read_run_file(path: Path, *, typed_first: RunSpec = RunSpec(), rights: Rights = Rights()) -> RunSpec:  # noqa: B008 - immutable
    """The run in a file, with absolute paths. Of a record, files that `typed_first` replaces may be anywhere.

    OptionError if the file cannot be read, has an unknown key or a value of another type, or names more than `rights`.
    """
    try:
        content = read_regular(path)
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if path.suffix.lower() == ".json" or content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        found = _of_record(path, content)
        typed_over: dict[str, Any] = {
            one.name: one.default for one in fields(RunSpec) if getattr(typed_first, one.name)
        }
        typed_over["settings"] = {key: one for key, one in found.settings.items() if key not in typed_first.settings}
        left = replace(found, **typed_over)
        check_named_files(left.named_files(), path, rights, instead="the folder of images, --model and the like")
        check_links(left.settings.get("follow_links"), path, rights)
        return found
    return arguments_in(parsed_toml(path, content), path)


def parsed_toml(path: Path, content: bytes) -> dict[str, Any]:
    """A file of settings as TOML values. OptionError if it is too large, or not TOML."""
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        return tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} must be TOML, such as steps = 500, but {error}; correct that line") from error


def arguments_in(found: Mapping[str, Any], path: Path) -> RunSpec:
    """The run that the values in a file of settings describe, with absolute paths. Raises OptionError."""
    own = [one.name for one in fields(RunSpec) if one.name != "settings"]
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
            RunSpec,
        )
    except ValueError as error:
        raise OptionError(f"{path}: {error}; correct it") from error
    return _absolute(given, path.resolve().parent)


def _of_record(path: Path, content: bytes) -> RunSpec:
    try:
        record = parsed_record(content.removeprefix(codecs.BOM_UTF8))
        if record.source.get("command") != "train":
            raise ValueError("was not made by lorasmith train" if record.source else "has no source of a run")
        spec = RunSpec.from_record(record.source, record.asked)
    except ValueError as error:
        raise OptionError(
            f"{path} must be the run.json of a run by lorasmith train, but {error}; name another, or settings in TOML"
        ) from error
    known = ("command", "folder", "data", *(one.name for one in fields(RunSpec)), *options_of(DataConfig))
    unknown = [name for name in record.source if name not in known]
    unknown += [name for name in record.asked if name not in options_of(TrainConfig)]
    if unknown:
        raise OptionError(
            f"{path} has settings of another version of Lorasmith, {', '.join(unknown)}; train with that version, or "
            "remove them"
        )
    return spec


def _absolute(given: RunSpec, folder: Path) -> RunSpec:
    def inside(path: str) -> str:
        return str(folder / path)

    def file(path: str) -> str:  # a hub id or a built-in name is not a path
        return inside(path) if (folder / path).exists() else path

    settings = {
        key: inside(value) if key in SETTING_PATHS and isinstance(value, str) and value != NONE_LORA else value
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
    """A list of values, which may be missing or a single value."""
    return value if isinstance(value, list) else [] if value is None else [value]
