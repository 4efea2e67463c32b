"""Questions about the models in the model folders, and the names by which runs select them."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from lorasmith.app.model_list import ListedFile, ListedModel, ModelList, list_models
from lorasmith.core.errors import ModelError
from lorasmith.core.folders import ASSETS, Folders, fingerprint
from lorasmith.families.locating import built_in_models
from lorasmith.families.model_search import ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDERS, in_folders
from lorasmith.server.api_shapes import MissingPart, ModelListAnswer, ModelRow, OtherFile
from lorasmith.server.questions.question_registry import shaped

_KINDS = (*MODEL_FOLDERS, *ENCODER_FOLDERS, *VAE_FOLDERS)


@shaped
def models(folders: Folders) -> ModelListAnswer:
    """The models in the model folders, built-in ones last, and the other files there."""
    found = _listed(folders)
    rows = [_row(folders, one) for one in found.models]
    return ModelListAnswer(
        models=tuple(sorted(rows, key=lambda row: row.builtin)),
        other=tuple(map(_other, (*found.unused, *found.unknown))),
    )


def known_model(folders: Folders, name: str) -> str:
    """The model of a request, in the model folders or built in. Raises ModelError for other paths and downloads."""
    if name in built_in_models():
        return name
    for kind in MODEL_FOLDERS:
        try:
            folders.find(kind, name)
        except ModelError:
            continue
        return name
    if Path(name).is_absolute() and _is_in_folders(folders, Path(name)):
        return name
    raise ModelError(f"there is no model {name!r} in the model folders; choose one of the list")


def model_name(folders: Folders, path: Path, kinds: tuple[str, ...] = MODEL_FOLDERS) -> str:
    """The name by which a run finds a file in folders of `kinds`, in order; its path if there is none."""
    for name, built_in in built_in_models().items():
        if built_in == path:
            return name
    for kind in kinds:
        for root in folders.roots(kind):
            if path.is_relative_to(root):
                name = path.relative_to(root).as_posix()
                if in_folders(name, folders, kinds) == str(path):
                    return name
    return str(path)


def _is_in_folders(folders: Folders, path: Path) -> bool:
    plain = Path(os.path.normpath(path))
    return any(plain.is_relative_to(root) for kind in MODEL_FOLDERS for root in folders.roots(kind)) and plain.exists()


def _listed(folders: Folders) -> ModelList:
    """The list, cached until a file changes."""
    roots = sorted({root for kind in _KINDS for root in folders.roots(kind) if root.is_dir()})
    return _listed_once(_Hashable(folders), repr([fingerprint(root) for root in roots]))


class _Hashable:
    """Folders as a cache key: equal if they search the same places."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self._key = repr((folders.base, [folders.roots(kind) for kind in _KINDS]))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self._key == other._key


@functools.lru_cache(maxsize=4)
def _listed_once(folders: _Hashable, state: str) -> ModelList:
    return list_models(folders.folders)


def _row(folders: Folders, one: ListedModel) -> ModelRow:
    return ModelRow(
        name=model_name(folders, one.path),
        title=one.path.stem if one.path.is_file() else one.path.name,
        family=one.family,
        place=one.place,
        size_bytes=one.size_bytes,
        precision=one.precision,
        builtin=one.path.is_relative_to(ASSETS),
        ready=one.is_whole,
        missing=tuple(MissingPart(part=part.component, usual_file=part.usual_file) for part in one.missing),
    )


def _other(one: ListedFile) -> OtherFile:
    return OtherFile(name=one.path.name, place=one.place, what=one.what, size_bytes=one.size_bytes)
