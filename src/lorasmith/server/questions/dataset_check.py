"""The check of a dataset, worded for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorasmith.app.data_check import DataCheck, check_folder
from lorasmith.app.data_check_page import said_of
from lorasmith.app.run_spec import SETTINGS
from lorasmith.core.errors import DataError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.options import config_from, options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.data.findings import Finding, FindingKind
from lorasmith.data.preflight import name_in
from lorasmith.families.locating import ModelFiles
from lorasmith.server.api_shapes import CheckedPicture, Crop, DataCheckAnswer, FindingFacts, Severity, SkippedFile
from lorasmith.server.questions.dataset_folders import dataset_folder, pictures_in
from lorasmith.server.questions.dataset_questions import picture_row
from lorasmith.server.questions.question_registry import shaped
from lorasmith.training.config import TrainConfig, settings_from_file

_SEVERITIES: dict[FindingKind, Severity] = {
    "unused files": "problem",
    "empty pictures": "problem",
    "tiny pictures": "problem",
    "missing captions": "problem",
    "shared tags": "remark",
}

_REMEDIES: dict[FindingKind, str] = {  # where the command line's remedy names a flag
    "unused files": "replace or remove what cannot be used",
    "tiny pictures": "use larger pictures, or a lower resolution",
    "enlarged pictures": "use larger pictures, or a lower resolution",
    "cut pictures": "crop them yourself to what matters",
    "copies": "remove all but one of each",
    "look-alikes": "remove all but one of each, as a picture that is there twice is learnt twice",
    "missing captions": "write captions, or give a trigger word that names the subject",
    "empty captions": "write the captions",
}


@shaped
def check_dataset(
    folders: Folders,
    name: str,
    *,
    model: str | None = None,
    trigger: str = "",
    settings: Mapping[str, Any] | None = None,
) -> DataCheckAnswer:
    """Check a dataset with the sizes and tokenizer of a model (None: common sizes) and settings of data and training.
    Raises UnknownFileError, and LorasmithErrors for the model or settings.
    """
    folder = dataset_folder(folders, name)
    data, training = split_settings(folders, settings or {}, trigger)
    try:
        checked = check_folder(
            folder,
            data,
            files=None if model is None else ModelFiles(model),
            folders=folders,
            batch=training.samples_per_step,
            validation_share=training.validation_share,
        )
    except DataError as error:
        found, skipped, notes = pictures_in(folders, folder)
        reasons = [*skipped, *((one.path, problem) for one in found if (problem := picture_row(one).problem))]
        finding = FindingFacts(
            kind="no pictures", message=str(error), files=tuple(one.name for one in found), severity="problem"
        )
        return DataCheckAnswer(
            findings=(finding,) if found or skipped else (),
            images={},
            skipped=tuple(SkippedFile(file=name_in(folder, path), reason=reason) for path, reason in reasons),
            notes=tuple(notes),
        )
    return _check_answer(checked)


def split_settings(folders: Folders, settings: Mapping[str, Any], trigger: str = "") -> tuple[DataConfig, TrainConfig]:
    """Settings by name as data and training configs; a choice is limited to registered names. Raises OptionError if one
    is unknown, out of range, or not allowed in requests.
    """
    for name, value in settings.items():
        if name in SETTINGS and SETTINGS[name].door == "typed" and value not in (None, "none", False):
            raise OptionError(f"{name} is not for requests, got {value!r}; type it on the command line")
    own = {key: value for key, value in settings.items() if key in options_of(DataConfig)}
    others = {key: value for key, value in settings.items() if key not in own}
    named = {"follow_links": folders.follow_links, **({"trigger": trigger} if trigger else {})}
    return config_from(DataConfig, {**own, **named}), settings_from_file(others)


def _check_answer(checked: DataCheck) -> DataCheckAnswer:
    found = checked.preflight
    return DataCheckAnswer(
        findings=tuple(_finding(one, [image.name for image in found.images]) for one in found.findings),
        images={
            one.name: CheckedPicture(
                problems=tuple(text for said in said_of(found, index) for text in said),
                crop=_crop(one.crop, one.file.width, one.file.height),
                trained=one.bucket,
                tokens=one.tokens,
            )
            for index, one in enumerate(found.images)
        },
        skipped=tuple(SkippedFile(file=name_in(found.folder, path), reason=reason) for path, reason in found.skipped),
        notes=found.notes,
        resolutions=found.resolutions,
        assumed=checked.is_size_assumed,
        held_out=found.epoch.held_out,
        samples_per_epoch=found.epoch.samples,
    )


def _finding(one: Finding, names: list[str]) -> FindingFacts:
    said = replace(one, remedy=_REMEDIES.get(one.kind, one.remedy)).sentence
    return FindingFacts(
        kind=one.kind,
        message=f"{said[:1].upper()}{said[1:]}.",
        files=tuple(names[index] for index in one.images),
        severity=_SEVERITIES.get(one.kind, "warning"),
    )


def _crop(box: tuple[float, float, float, float], width: int, height: int) -> Crop:
    left, top, right, bottom = box
    shares = (left / width, top / height, (right - left) / width, (bottom - top) / height)
    x, y, across, down = (round(one, 5) for one in shares)
    return Crop(x=x, y=y, width=across, height=down)
