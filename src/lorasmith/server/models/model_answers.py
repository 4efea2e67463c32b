"""Questions about models: those in the folders, the shelf, what the hub says of them, and model files that are sent.

Only `check_download`, `download_files` of a captioner and `store_token` use the network.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lorasmith.core.errors import ModelError, OptionError
from lorasmith.core.extras import TINY, models_trouble
from lorasmith.core.files import ensure_folder
from lorasmith.core.folders import BUILT_IN_BASE, Folders, fingerprint, safe_name
from lorasmith.data.captioners import CAPTIONERS, TRANSFORMERS
from lorasmith.families.locating import ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDERS, built_in_models
from lorasmith.families.model_search import FoundFile, in_folders, recognised_file
from lorasmith.families.parts.encoders import ENCODERS
from lorasmith.runs import shelf as models_to_get
from lorasmith.runs.captioner_shelf import CAPTIONER_RELEASES, captioner_files, captioner_folders, kept_bytes
from lorasmith.runs.hub_download import HubFile, facts_of_all, store_token
from lorasmith.runs.model_list import ListedFile, ListedModel, ModelList, list_models
from lorasmith.runs.shelf import ShelfModel, memory_of, parts_on_hub, wanted_files
from lorasmith.runs.time_estimate import STEP_WORK, Rates, StepWork, best_of, rates_of, usual_s, work_of
from lorasmith.server.datasets.dataset_change_answers import TakenNameError
from lorasmith.server.models.model_shapes import (
    AddedModel,
    CaptionerList,
    CaptionerRow,
    DownloadCheck,
    FileToGet,
    MissingPart,
    ModelListAnswer,
    ModelRow,
    OtherFile,
    ReleaseMemory,
    ShelfAnswer,
    ShelfFileRow,
    ShelfRow,
)
from lorasmith.server.questions import question, shaped

DownloadKind = Literal["release", "model", "captioner"]
_KINDS = (*MODEL_FOLDERS, *ENCODER_FOLDERS, *VAE_FOLDERS)


@question
def models(folders: Folders, *, device: str | None = None) -> ModelListAnswer:
    """The models in the model folders, built-in ones last, and the other files there, with the time of a LoRA on a
    device.
    """
    listed = listed_models(folders)
    rates = None if device is None else rates_of(device)
    rows = [_model_row(folders, model, rates) for model in sorted(listed.models, key=attrgetter("size_bytes"))]
    whole = [row for row in rows if row.ready and not row.builtin and not row.edit and not row.clips]
    best = best_of((row.name, row.seconds, None) for row in whole)
    if best is None:
        best = next((row.name for row in rows if row.builtin), None)
    rows = [replace(row, best=row.name == best) for row in rows]
    return ModelListAnswer(
        models=tuple(sorted(rows, key=lambda row: row.builtin)),
        other=(
            *(_other(file, recognised=True) for file in listed.unused),
            *(_other(file, recognised=False) for file in listed.unknown),
        ),
        notes=tuple(filter(None, (TINY.trouble, models_trouble()))),
    )


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


def listed_models(folders: Folders) -> ModelList:
    """The list, cached until a file changes."""
    return _listed_once(*state_of_models(folders))


def state_of_models(folders: Folders) -> tuple[HashableFolders, str]:
    """The folders and the state of the files of models in them, for caches."""
    roots = sorted({root for kind in _KINDS for root in folders.roots(kind) if root.is_dir()})
    return HashableFolders(folders), repr([fingerprint(root) for root in roots])


class HashableFolders:
    """Folders as a cache key: equal if they search the same places."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self._key = repr((folders.base, [folders.roots(kind) for kind in _KINDS]))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashableFolders) and self._key == other._key


@functools.lru_cache(maxsize=4)
def _listed_once(folders: HashableFolders, state: str) -> ModelList:
    return list_models(folders.folders)


def _model_row(folders: Folders, model: ListedModel, rates: Rates | None) -> ModelRow:
    missing = (
        MissingPart(part=part.component, usual_file=part.usual_file, on_hub=part.hub is not None)
        for part in model.missing
    )
    name, builtin = model_name(folders, model.path), model.path.is_relative_to(BUILT_IN_BASE)
    return shaped(
        ModelRow,
        model,
        name=name,
        title=model.path.stem if model.path.is_file() else model.path.name,
        builtin=builtin,
        **_times(STEP_WORK.get(name) if builtin else work_of(model.family, model.weights), rates),
        clips=model.makes_clips,
        ready=model.is_whole,
        missing=tuple(missing),
        recognised_by=model.edit_recognised_by,
        takes_controls=model.form.most > 0 and model.form.are_files,
    )


def _times(work: StepWork | None, rates: Rates | None) -> dict[str, float]:
    """The fields of rows that say how long it takes; nothing where that is unknown."""
    if work is None or rates is None:
        return {}
    picture = rates.step_s(work)
    return {"seconds": usual_s(picture), "seconds_per_picture": picture}


def _other(file: ListedFile, *, recognised: bool) -> OtherFile:
    return shaped(OtherFile, file, name=file.path.name, recognised=recognised)


@question
def captioners(folders: Folders) -> CaptionerList:
    """What writes captions: in the model folders, of other packages, and released ones to download."""
    here = captioner_folders(folders)
    own = []
    for name in here:
        known = CAPTIONER_RELEASES.get(name)
        title, about = (name, "") if known is None else (known.title, known.about)
        own.append(CaptionerRow(name=name, title=title, about=about, found=True))
    others = [CaptionerRow(name=name, title=name, found=True) for name in CAPTIONERS if name != TRANSFORMERS]
    offered = [
        shaped(
            CaptionerRow,
            release,
            card=f"https://huggingface.co/{release.repository}",
            size_bytes=int(release.gigabytes * 1e9),
            kept_bytes=kept_bytes(folders, release.name),
            found=False,
        )
        for release in CAPTIONER_RELEASES.values()
        if release.name not in here
    ]
    missing = "" if find_spec("transformers") else 'captioners need transformers: pip install "lorasmith[models]"'
    return CaptionerList(captioners=(*own, *others, *offered), notes=(missing,) if missing else ())


@question
def shelf(folders: Folders, *, device: str | None = None, card_bytes: int | None = None) -> ShelfAnswer:
    """The released models to begin with, the smallest first, with the time of a LoRA on a device."""
    rates = None if device is None else rates_of(device)
    rows = [_row(model, rates, card_bytes) for model in _on_shelf(*state_of_models(folders))]
    best = best_of((row.name, row.seconds, row.fits) for row in rows if not row.clips)
    return ShelfAnswer(models=tuple(replace(row, best=row.name == best) for row in rows))


@functools.lru_cache(maxsize=2)
def _on_shelf(folders: HashableFolders, state: str) -> list[ShelfModel]:
    return models_to_get.shelf(folders.folders)


@question
def shelf_memory(folders: Folders, *, name: str, card_bytes: int | None = None) -> ReleaseMemory:
    """The memory of training a released model. Raises OptionError for an unknown one."""
    found = memory_of(name)
    if card_bytes is None:
        return ReleaseMemory(memory_bytes=found.proposal.needed_bytes, fits=None, encoders_fit=None)
    found = replace(found, card_bytes=card_bytes)
    return ReleaseMemory(memory_bytes=found.proposal.needed_bytes, fits=found.fits, encoders_fit=found.encoders_fit)


@question
def download_files(folders: Folders, *, kind: DownloadKind, name: str) -> dict[str, Any]:
    """What to download for a released model, for one in the folders that lacks parts, or of a captioner: `title` and
    `files`. Raises OptionError and ModelError.
    """
    title, files = _wanted(folders, kind, name)
    return {
        "title": title,
        "files": [{"repository": file.repository, "file": file.file, "path": str(file.path)} for file in files],
    }


@question
def check_download(folders: Folders, *, kind: DownloadKind, name: str) -> DownloadCheck:
    """What the hub says of the files to download. Raises HubError, GatedError, and as `download_files`."""
    title, files = _wanted(folders, kind, name)
    facts = facts_of_all(files)
    return DownloadCheck(
        title=title,
        files=tuple(
            FileToGet(
                file=hub_file.path.name,
                repository=hub_file.repository,
                folder=_folder(folders, hub_file),
                size_bytes=fact.size_bytes,
                kept_bytes=min(hub_file.kept_bytes, fact.size_bytes),
            )
            for hub_file, fact in facts.items()
        ),
        free_bytes=shutil.disk_usage(next(parent for parent in files[0].path.parents if parent.exists())).free,
    )


@question
def store_hub_token(folders: Folders, *, token: str) -> dict[str, Any]:
    """Store an access token of the hub. Raises HubError."""
    store_token(token)
    return {"stored": True}


@question
def check_model_name(folders: Folders, *, file: str) -> str:
    """The name that a sent model file gets. Raises OptionError for a file that is not a model, and TakenNameError."""
    name = PurePosixPath(file.replace("\\", "/")).name
    stem, suffix = name.rpartition(".")[0], name.rpartition(".")[2].lower()
    if suffix not in _SENT:
        raise OptionError(
            f"a model must be a file {' or '.join(f'.{suffix}' for suffix in _SENT)}, got {name!r}; choose another"
        )
    wanted = f"{safe_name(stem)}.{suffix}"
    for kind in _KINDS:
        for known in folders.files(kind):
            if PurePosixPath(known).name.casefold() == wanted.casefold():
                raise TakenNameError(f"there is a file {wanted} in the model folders already; rename the other one")
    return wanted


@question
def add_model(folders: Folders, *, file: str, temporary: str) -> AddedModel:
    """Move a sent file into the folder for what it holds. Raises ModelError if that is not known, and as
    `check_model_name`.
    """
    name, path = check_model_name(folders, file=file), Path(temporary)
    named = path.with_name(name)  # its suffix names the format
    path.rename(named)
    try:
        found = recognised_file(named, "uploads")
        if found.fault:
            raise ModelError(
                f"{name} cannot be used, {found.fault}; send a checkpoint, a denoiser, an encoder or a VAE"
            )
        kind = _kind_of(found)
        target = ensure_folder(folders.roots(kind)[0]) / name
        shutil.move(named, target)
    finally:
        named.unlink(missing_ok=True)
    return AddedModel(file=name, place=f"models/{kind}", model=model_name(folders, target) if found.family else "")


_SENT = ("safetensors", "sft", "gguf")


def _kind_of(found: FoundFile) -> str:
    """The kind of folder for a file."""
    if found.family is not None:
        return MODEL_FOLDERS[0 if found.parts else 1]
    if found.autoencoder is not None:
        return VAE_FOLDERS[0]
    return ENCODER_FOLDERS[ENCODERS[str(found.encoder)].title.startswith("image")]


def _wanted(folders: Folders, kind: str, name: str) -> tuple[str, list[HubFile]]:
    if kind == "release":
        shelf_model = wanted_files(folders, name)
        title, files = shelf_model.release.title, [file.hub for file in shelf_model.missing]
    elif kind == "captioner":
        files = captioner_files(folders, name)
        title = CAPTIONER_RELEASES[name].title
    else:
        model = next(
            (model for model in listed_models(folders).models if model_name(folders, model.path) == name), None
        )
        if model is None:
            raise ModelError(f"there is no model {name!r} in the model folders; choose one of the list")
        title, files = f"Parts of {model.path.name}", parts_on_hub(folders, model)
    if not files:
        raise OptionError(f"nothing of {name} is missing that the hub is known to have; look at the list again")
    return title, files


def _row(model: ShelfModel, rates: Rates | None, card_bytes: int | None) -> ShelfRow:
    release, work = model.release, STEP_WORK.get(model.release.name)
    least = None if work is None else int(work.least_gib * 2**30)
    return shaped(
        ShelfRow,
        release,
        family=model.family.title,
        card=f"https://huggingface.co/{release.card}",
        gated=release.is_gated,
        **_times(work, rates),
        edits=model.edits,
        clips=model.family.makes_clips,
        least_memory_bytes=least,
        fits=None if least is None or card_bytes is None else least <= card_bytes,
        files=tuple(
            ShelfFileRow(
                part=file.component,
                file=file.hub.path.name,
                size_bytes=int(file.gigabytes * 1e9),
                kept_bytes=file.hub.kept_bytes,
                found=file.found is not None,
            )
            for file in model.files
        ),
    )


def _folder(folders: Folders, file: HubFile) -> str:
    folder, base = file.path.parent, folders.base
    return folder.relative_to(base).as_posix() if folder.is_relative_to(base) else str(folder)
