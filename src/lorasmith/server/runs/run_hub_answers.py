"""The folder that a LoRA of a run is shared with (`runs.model_card`): written, downloaded, uploaded to the hub."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.files import ensure_folder
from lorasmith.core.folders import Folders, safe_name
from lorasmith.runs.hub_download import hub_token
from lorasmith.runs.hub_upload import named_repository, upload_card
from lorasmith.runs.model_card import CARD, Card, is_card, write_card
from lorasmith.runs.run_page import is_own
from lorasmith.server.datasets.dataset_folders import UnknownFileError, stays_in
from lorasmith.server.questions import question, shaped
from lorasmith.server.runs.run_list_answers import run_folder_of
from lorasmith.server.runs.run_shapes import HubFile, HubFolder, HubFolderBody, HubUpload
from lorasmith.server.server_disk import disk_space
from lorasmith.training.storage.records import read_record

_FOLDER = "hub"  # in that of a run; the command's `card` may have been edited
_MOST_TOLD = 300  # characters of a value that are answered
_WRITING: dict[str, threading.Lock] = defaultdict(threading.Lock)  # by run; held until it is uploaded


@question
def write_hub_folder(
    folders: Folders,
    id: str,
    *,
    step: int | None = None,
    trigger: str = "",
    base_model: str = "",
    licence: str = "",
    private_captions: bool = True,
    with_training_pictures: bool = False,
) -> HubFolder:
    """Write the folder to share a LoRA of a run with, in place of an earlier one. Raises UnknownFileError, and as
    `write_card`.
    """
    asked = HubFolderBody(
        step=step,
        trigger=trigger,
        base_model=base_model,
        licence=licence,
        private_captions=private_captions,
        with_training_pictures=with_training_pictures,
    )
    with _WRITING[id]:
        card = _written(folders, id, asked)
        files = _files(card.folder)
        return shaped(
            HubFolder,
            card,
            folder=f"{id}/{_FOLDER}",
            files=tuple(HubFile(path=name, bytes=path.stat().st_size) for name, path in files.items()),
            told={key: value[:_MOST_TOLD] for key, value in card.told.items()},
            can_upload=bool(hub_token()),
        )


@question
def hub_folder_files(folders: Folders, id: str) -> dict[str, Any]:
    """`files`: paths of what is in the folder, by names there; `title`: its own name. Raises UnknownFileError."""
    folder = run_folder_of(folders, id)
    place = folder / _FOLDER
    if not (is_own(place / CARD, folder) and is_card(place)):
        raise UnknownFileError(f"{id} has no folder for the hub yet; have it written first")
    return {"title": _title(folder), "files": {name: str(path) for name, path in _files(place).items()}}


@question
def upload_hub_folder(
    folders: Folders,
    id: str,
    *,
    repository: str,
    folder: HubFolderBody,
    told: tuple[str, ...] = (),
    public: bool = False,
) -> HubUpload:
    """Write the folder again, for a repository, and upload it. Raises as `write_hub_folder`, HubError, and OptionError
    if the LoRA's metadata tells more than the entries `told`.
    """
    named = named_repository(repository.strip())
    with _WRITING[id]:
        card = _written(folders, id, folder, named)
        if more := [fact for fact in card.told if fact not in told]:
            raise OptionError(
                f"the LoRA's metadata tells of folders, captions or prompts that were not listed ({', '.join(more)}); "
                "list the folder again, or leave this out"
            )
        return shaped(HubUpload, upload_card(card.folder, named, public=public))


def _written(folders: Folders, id: str, asked: HubFolderBody, repository: str = "") -> Card:
    folder = run_folder_of(folders, id)
    place = folder / _FOLDER
    if not stays_in(place, folder.resolve()):
        raise OutputError(f"the folder {_FOLDER} of {folder.name} is a link to somewhere else; remove the link")
    largest = max((path.stat().st_size for path in folder.glob("*.safetensors")), default=0)
    with disk_space(ensure_folder(folder), largest):
        return write_card(folder, place, repository=repository or _title(folder), overwrite=True, **vars(asked))


def _title(folder: Path) -> str:
    """The LoRA's name, which the folder has in a ZIP file."""
    return safe_name(read_record(folder).title or folder.name)


def _files(folder: Path) -> dict[str, Path]:
    """The files of the folder by name, the card first."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and is_own(path, folder))
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {CARD: named.pop(CARD), **named}
