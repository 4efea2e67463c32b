"""What is drawn with the LoRAs of a run: its evaluation, its gallery, a card to share; and the LoRA to use."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.core.errors import ModelError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.clips import open_still
from lorasmith.evaluation.evaluation_record import EVALUATION
from lorasmith.evaluation.likeness import check_installed, is_installed
from lorasmith.evaluation.wishes import BUILT_IN_KINDS, KINDS, asked_with
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.report.pictures import thinned
from lorasmith.report.share_card import MOST_PROMPTS, WIDTH, share_card
from lorasmith.runs.evaluate import candidates_of, subject_of
from lorasmith.runs.gallery import MOST_STEPS, read_grids
from lorasmith.runs.preview_budget import Effort, evaluation_effort
from lorasmith.runs.run_images import subject_words
from lorasmith.runs.run_log import followed
from lorasmith.runs.run_page import is_own
from lorasmith.runs.view import preview_file
from lorasmith.server.questions import question
from lorasmith.server.runs.run_list_answers import evaluation_of, run_folder_of
from lorasmith.server.runs.run_result_answers import drawing_of, drawn_with, usual_strengths
from lorasmith.server.runs.run_shapes import EvaluationAnswer, GalleryAnswer
from lorasmith.training.storage.records import read_record

_MOST_WISH = 1_000  # characters


@question
def run_evaluation(folders: Folders, id: str) -> EvaluationAnswer:
    """The stored evaluation of the LoRAs of a run. Raises UnknownFileError."""
    folder = run_folder_of(folders, id)
    subject = subject_words(read_record(folder))
    found = EvaluationAnswer(evaluation=evaluation_of(folder), folder=EVALUATION, subject=subject)
    try:
        _, _, model = drawn_with(folders, id)
    except (OptionError, ModelError):  # what was evaluated elsewhere is shown all the same
        return found
    effort = _effort(folder, model, subject)
    return replace(found, pictures=effort.pictures, seconds=effort.seconds)


@question
def evaluation_request(folders: Folders, id: str, *, subject: str = "") -> dict[str, Any]:
    """The request of a job that evaluates the LoRAs of a run. Raises as `drawing_facts`, and OptionError if neither it
    nor `subject` says what to draw, or the extra `likeness` is missing.
    """
    check_installed()
    _check_length("a subject", subject)
    folder, spec, model = drawn_with(folders, id)
    if model.control_form.is_required:
        raise OptionError(f"{model.title} ({model.family.title}) draws from pictures; LoRAs of it cannot be evaluated")
    trigger = subject_of([folder], trigger=subject.strip() or None).trigger
    asked = {"subject": subject.strip(), "drawing": asdict(_effort(folder, model, trigger).drawing)}
    return {"run": id, "model": spec.model, "files": asdict(spec.files), **asked}


@question
def evaluation_afterwards(folders: Folders, id: str) -> dict[str, Any] | None:
    """As `evaluation_request`, of a run that has just ended; None if it has an evaluation, or cannot be evaluated."""
    folder = run_folder_of(folders, id)
    if not is_installed() or evaluation_of(folder) is not None or not subject_words(read_record(folder)):
        return None
    _, spec, model = drawn_with(folders, id)
    if model.control_form.most or spec.config.consequences().learns_no_subject:
        return None
    return evaluation_request(folders, id)


@question
def run_gallery(folders: Folders, id: str) -> GalleryAnswer:
    """The gallery of a run. Raises UnknownFileError, and as `drawing_facts`."""
    folder, spec, _ = drawn_with(folders, id)
    steps = tuple(step for step, _ in _drawn_steps(folder))
    return GalleryAnswer(
        kinds=dict(BUILT_IN_KINDS if spec.model == BUILT_IN else KINDS),
        steps=steps,
        strengths=usual_strengths(spec),
        grids=read_grids(folder),
        subject=subject_words(read_record(folder)),
    )


@question
def grid_request(folders: Folders, id: str, *, wish: str, subject: str = "") -> dict[str, Any]:
    """The request of a job that draws a grid, of `subject` where the run has none. Raises as `drawing_facts`, and
    OptionError for a wish that is empty or too long, and for models that draw from pictures.
    """
    _check_length("a wish", wish, least=1)
    _check_length("a subject", subject)
    folder, spec, model = drawn_with(folders, id)
    if model.control_form.is_required:
        raise OptionError(f"{model.title} ({model.family.title}) draws from pictures; try its LoRA on one of them")
    trigger = subject_words(read_record(folder)) or subject.strip()
    return {
        **drawing_of(id, spec, model),
        "wish": wish.strip(),
        "text": asked_with(trigger, wish.strip()) if trigger else wish.strip(),
        "loras": [[step, name] for step, name in _drawn_steps(folder)],
        "strengths": list(usual_strengths(spec)),
    }


@question
def run_card(folders: Folders, id: str) -> bytes:
    """A PNG file to share, with pictures of the recommended LoRA, else with the last previews. It names no path.

    Raises UnknownFileError, and OptionError if nothing was drawn.
    """
    folder = run_folder_of(folders, id)
    record = read_record(folder)
    step, rows = _shown(folder)
    if not rows:
        raise OptionError(f"{id} has no pictures with its LoRA and without it; draw previews or evaluate it")
    subject = subject_words(record)
    model = record.model.name.replace("\\", "/").rsplit("/", 1)[-1]
    facts = [f"Write “{subject}” in prompts" if subject else "", f"step {step:,}" if step else "", model]
    return share_card(rows, title=subject or record.title or folder.name, facts=" · ".join(filter(None, facts)))


def _effort(folder: Path, model: Model, trigger: str) -> Effort:
    """What an evaluation of a run draws."""
    with followed(folder) as run:
        seconds, sampling_step_s, title = run.view.seconds, run.view.sampling_step_s, run.record.title
    loras = len(candidates_of(folder, title))
    return evaluation_effort(model, trigger, loras, training_s=seconds, sampling_step_s=sampling_step_s)


def _check_length(what: str, text: str, least: int = 0) -> None:
    if not least <= len(text.strip()) <= _MOST_WISH:
        between = f"between {least} and {_MOST_WISH:,} characters"
        raise OptionError(f"{what} must have {between}, got {len(text):,}; change it")


def _drawn_steps(folder: Path) -> list[tuple[int, str]]:
    """Steps and files of the LoRAs that are drawn in a grid."""
    saves = [candidate for candidate in candidates_of(folder, read_record(folder).title) if candidate.step is not None]
    return [(save.step or 0, save.path.name) for save in thinned(saves, MOST_STEPS)]


def _shown(folder: Path) -> tuple[int | None, list[tuple[str, Image.Image, Image.Image]]]:
    """The step of the LoRA that is shown, and its pictures beside those of the base model, by prompt."""
    evaluation = evaluation_of(folder)
    best = None if evaluation is None or evaluation.verdict.best is None else evaluation.loras[evaluation.verdict.best]
    if evaluation is not None and best is not None:
        step, files = best.step, list(zip(evaluation.prompts, evaluation.base, best.pictures, strict=True))
        named = [(prompt, f"{EVALUATION}/{base}", f"{EVALUATION}/{tuned}") for prompt, base, tuned in files]
    else:
        with followed(folder) as run:
            previews = sorted(run.view.previews.items())
        bases = [event for (_, strength), event in previews if strength == 0]
        tuned_events = [event for (_, strength), event in previews if strength == 1]
        if not bases or not tuned_events:
            return None, []
        step, prompts = tuned_events[-1].step, tuned_events[-1].prompts
        rows = zip(prompts, bases[-1].paths, tuned_events[-1].paths, strict=False)
        named = [(prompt, preview_file(base), preview_file(tuned)) for prompt, base, tuned in rows]
    own = [names for names in named if is_own(folder / names[1], folder) and is_own(folder / names[2], folder)][
        :MOST_PROMPTS
    ]
    return step, [(prompt, _opened(folder / base), _opened(folder / tuned)) for prompt, base, tuned in own]


def _opened(path: Path) -> Image.Image:
    return open_still(path, WIDTH)
