"""Results of a run: an installed LoRA, and a longer run."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorasmith.app.recorded_run import Rights, repeated
from lorasmith.app.run_page import is_own, lora_of_run
from lorasmith.app.run_spec import RunSpec
from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.files import atomic_path, ensure_folder
from lorasmith.core.folders import Folders
from lorasmith.core.options import changed
from lorasmith.core.safe_names import safe_name
from lorasmith.server.api_shapes import InstalledLora
from lorasmith.server.disk_space import disk_space
from lorasmith.server.questions.plan_questions import check_steps
from lorasmith.server.questions.question_registry import shaped
from lorasmith.server.questions.run_folders import digest_of, is_trainable_on, run_folder_of, saves_of
from lorasmith.training.runs.history import RECORD, RunHistory, read_history
from lorasmith.training.runs.run_folder import RunFolder

_INSTALLING = threading.Lock()  # held while a free name is found and used


@shaped
def install_run(folders: Folders, id: str, *, step: int | None = None, name: str = "") -> InstalledLora:
    """Copy a LoRA of a run, saved at `step` (None: the final one), into `models/loras`, where other programs find it;
    existing files are not replaced. Raises UnknownFileError, OptionError if there is no such LoRA, and OutputError.
    """
    folder = run_folder_of(folders, id)
    history = read_history(folder)
    lora = _lora_at(history, step)
    target = folders.base / "models" / "loras"
    stem = safe_name(name.strip().removesuffix(".safetensors") or lora.stem)
    with _INSTALLING:
        taken = {one.name.casefold(): one for one in ensure_folder(target).iterdir()}
        for number in range(1, 10_000):
            copy = target / f"{stem if number == 1 else f'{stem}-{number}'}.safetensors"
            if (there := taken.get(copy.name.casefold())) is None:
                break
            copy = there
            if copy.stat().st_size == lora.stat().st_size and digest_of(copy) == digest_of(lora):
                return InstalledLora(installed=copy.name, was_there=True)
        _copy(lora, copy)
    picture = lora.with_suffix(".png")
    if is_own(picture, folder) and not copy.with_suffix(".png").exists():
        _copy(picture, copy.with_suffix(".png"))
    return InstalledLora(installed=copy.name)


@shaped
def train_on_request(folders: Folders, id: str, *, steps: int) -> dict[str, Any]:
    """The request of a job that continues a complete run up to `steps` steps in total: a `RunSpec` as JSON. The run's
    record is untrusted: it may name only files below the base folder and in the model folders. Raises UnknownFileError,
    and OptionError if the run is incomplete or cannot be continued here.
    """
    check_steps(steps)
    folder = run_folder_of(folders, id)
    history = read_history(folder)
    record = history.record
    if record.source.get("command") != "train":
        raise OptionError(f"{id} was not trained on a folder; change the steps in its graph or script instead")
    if not is_trainable_on(history):
        raise OptionError(f"{id} is not complete, or has no run state to start from; continue it first")
    before = record.config.get("steps")
    if isinstance(before, int) and steps <= before:
        raise OptionError(f"steps must be more than the {before:,} of the run, got {steps:,}; add some")
    try:
        mine = RunSpec.from_record(record.source, {})
        given = {
            "model": mine.model if _is_model(folders, mine.model) else None,
            "text_encoders": mine.text_encoders if all(_is_model(folders, one) for one in mine.text_encoders) else (),
            "vae": mine.vae if mine.vae and _is_model(folders, mine.vae) else None,
        }
        # Whether links are followed is a setting of the server, not of the record.
        plain = replace(record, source={**record.source, "follow_links": False})
        spec = repeated(plain, folder / RECORD, Rights(), **given)  # type: ignore[arg-type]
    except ValueError as error:
        raise TrainingError(
            f"{folder / RECORD} is damaged ({error}); restore it from a copy, or train again"
        ) from error
    state = RunFolder(folder).states().paths()[0].resolve()
    settings = {**changed(spec.data), **changed(spec.config), "steps": steps, "existing_state": str(state)}
    settings |= {"follow_links": True} if folders.follow_links else {}
    return asdict(replace(spec, settings=settings))


def _lora_at(history: RunHistory, step: int | None) -> Path:
    if step is None:
        if (path := lora_of_run(history)) is None:
            raise OptionError(f"{history.folder.name} has saved no LoRA yet; continue it, or cancel it to save one")
        return path
    saves = list(saves_of(history.folder, history.record))
    found = next((one for one in saves if one.step == step), None)
    if found is None:
        known = ", ".join(sorted({f"{one.step:,}" for one in saves})) or "none"
        raise OptionError(f"{history.folder.name} has LoRAs of the steps {known}, got {step:,}; choose one of these")
    return history.folder / found.file


def _copy(source: Path, target: Path) -> None:
    ensure_folder(target.parent)
    with disk_space(target.parent, source.stat().st_size), atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _is_model(folders: Folders, path: str) -> bool:
    """Whether a path is in a model folder, so that a record may name it."""
    kinds = ("checkpoints", "diffusion_models", "text_encoders", "vae")
    plain = Path(os.path.normpath(path))
    return any(plain.is_relative_to(root) for kind in kinds for root in folders.roots(kind) if root.is_absolute())
