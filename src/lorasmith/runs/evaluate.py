"""Which LoRA is good: LoRAs of runs and of files, drawn on one seed, measured, and compared in a folder.

    evaluation.json          the `Evaluation`: prompts, measures, pictures, and the recommendation
    evaluation.html          the page about it, self-contained
    contact sheet.png        a row for each LoRA, a column for each prompt
    base-1.webp              what the base model draws for the first prompt
    lora-03-1.webp           what the third LoRA draws for it
    strength-0.4-1.webp      the recommended LoRA at a strength

The rules are in `evaluation.verdict`. A run's record is untrusted and names no file here: its training pictures are the
small versions in its folder, and its trigger is that of its LoRAs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.files import atomic_folder, atomic_path, write_atomic
from lorasmith.core.placement import best_device
from lorasmith.core.printable import count_text
from lorasmith.data.clips import open_still
from lorasmith.data.folder import scan_folder
from lorasmith.evaluation.evaluation_record import (
    EVALUATION,
    EVALUATION_PAGE,
    EVALUATION_RECORD,
    NOISES,
    DrawingSettings,
    EvaluatedLora,
    Evaluation,
    Measures,
    StrengthRow,
    Training,
    Verdict,
)
from lorasmith.evaluation.likeness import EDGE, check_installed
from lorasmith.evaluation.recognition import Recogniser, recogniser_of
from lorasmith.evaluation.verdict import LEAST_SELF_LIKENESS, Drawn, measured, training_facts, verdict
from lorasmith.evaluation.wishes import BUILT_IN_WISHES, WISHES, asked_with
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.metadata import steps_of
from lorasmith.report.contact_sheet import contact_sheet
from lorasmith.report.evaluation_page import EvaluationPage, EvaluationRow, evaluation_page
from lorasmith.report.pictures import KEPT_EDGE, PictureTable, thinned, webp
from lorasmith.runs.run_images import images_in, subject_words, thumbnail_of
from lorasmith.runs.run_page import is_own, loras_of_run
from lorasmith.sampling.generate import Sampling, generate_clips
from lorasmith.training.lora_handle import Lora
from lorasmith.training.storage.records import RECORD, read_record

SHEET = "contact sheet.png"

STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)  # of the recommended LoRA

STRIP = 2  # prompts at each strength
_LARGEST_SHEET = 4096  # pixels in either direction, labels aside

WITHOUT = ("a cat", "a bus", "a red apple", "a house")  # without the trigger


@dataclass(frozen=True)
class LoraCandidate:
    """A LoRA to evaluate."""

    path: Path
    label: str
    step: int | None = None  # None if the file does not say


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: LoRAs in the order of their training, their trigger, and the training pictures."""

    title: str
    candidates: tuple[LoraCandidate, ...]
    trigger: str
    pictures: tuple[Image.Image, ...] = ()
    folder: Path  # where the result goes if no other is named
    notes: tuple[str, ...] = ()


def subject_of(
    paths: Sequence[Path], *, trigger: str | None = None, images: Path | None = None, most: int = DrawingSettings.most
) -> Subject:
    """What is evaluated of folders of runs and LoRA files of any trainer, at most `most` LoRAs, evenly spaced.

    Raises OptionError if a folder holds no run, or one without LoRAs, or there is no trigger, or several; LoraError if
    a file is no safetensors file; DataError if the images cannot be read.
    """
    candidates: list[LoraCandidate] = []
    triggers: dict[str, None] = {}
    pictures: list[Image.Image] = []
    notes: list[str] = []
    for path in paths:
        several = len(paths) > 1
        if path.is_dir() and (path / RECORD).exists():
            record = read_record(path)
            mine = candidates_of(path, record.title, f"{path.name}, " if several else "")
            if not mine:
                raise OptionError(f"{path} has saved no LoRA yet; train it, or name another run")
            candidates += mine
            named = _trigger(mine[-1].path)
            if not named and (words := subject_words(record)):
                named = {words: None}
                notes.append(f"The LoRAs have no trigger; {words!r} is drawn, which all captions share.")
            triggers |= named
            pictures += _thumbnails(path, record.data)
        else:
            candidates.append(
                LoraCandidate(path, path.stem, steps_of(check_safetensors(path).metadata, path.name) or None)
            )
            triggers |= _trigger(path)
    if trigger is not None:
        triggers, notes = {trigger: None}, []
    if len(triggers) != 1:
        known = "none" if not triggers else "several, " + ", ".join(map(repr, triggers))
        raise OptionError(f"the LoRAs must have one trigger, got {known}; give it as trigger, such as 'sks dog'")
    if images is not None:
        pictures = [open_still(image.path, EDGE) for image in scan_folder(images).images]
    if not pictures:
        notes.append("There are no training pictures, so likeness is not measured; name their folder as images.")
    first = paths[0]
    return Subject(
        title=first.stem if first.suffix else first.name,
        candidates=tuple(thinned(candidates, most)),
        trigger=next(iter(triggers)),
        pictures=tuple(pictures),
        folder=first / EVALUATION if first.is_dir() else Path(f"{first.stem}-{EVALUATION}"),
        notes=tuple(notes),
    )


def loras_within(pictures: float) -> int:
    """How many LoRAs can be evaluated with so many pictures, by the default wishes."""
    each = NOISES * (1 + len(WISHES)) + 1 + len(WITHOUT)
    return max(0, int((pictures - STRIP * len(STRENGTHS)) / each - 1))


def evaluate(
    base: Model,
    subject: Subject,
    drawing: DrawingSettings,
    output: Path | None = None,
    *,
    clip: Path | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Evaluation:
    """Draw and measure each LoRA, and write the folder `output`, or that of the subject, in place of an earlier one.

    `clip` is a folder of a CLIP of transformers, which recognises wishes better than image features do. `progress`
    receives (sampling steps done, total). Raises OptionError if the model cannot draw from prompts alone or
    the extra `likeness` is missing, ModelError if it lacks a text encoder or an autoencoder, LoraError for a LoRA of
    another model, OutputError, and SamplingCancelledError, after which an earlier evaluation stays.
    """
    folder = output or subject.folder
    check_evaluation_folder(folder)
    check_installed()
    _check_draws(base)
    is_built_in = base.title == BUILT_IN
    recogniser = recogniser_of(is_built_in=is_built_in, clip=clip)
    training = recogniser.features(subject.pictures) if subject.pictures else None
    prompts = Prompts.of(subject.trigger, drawing, is_built_in=is_built_in)
    artist = _Artist(base, prompts, drawing, device or best_device(), len(subject.candidates), progress, cancelled)
    with atomic_folder(folder) as temporary:
        notes = list(subject.notes)
        without = artist.drawn(None)
        before = _seen(without, prompts, recogniser)
        base_names = _saved(temporary, "base", without[: len(prompts.shown)])
        of_candidates: list[Measures] = []
        kept: list[list[str]] = []
        for place, candidate in enumerate(subject.candidates, 1):
            pictures = artist.drawn(candidate.path, notes)
            of_candidates.append(measured(_seen(pictures, prompts, recogniser), before, training))
            kept.append(_saved(temporary, f"lora-{place:02}", pictures[: len(prompts.shown)]))
        facts = training_facts(training, before)
        chosen = verdict(of_candidates, facts)
        strip = () if chosen.best is None else artist.strip(subject.candidates[chosen.best].path)
        rows = [
            StrengthRow(strength=strength, pictures=tuple(_saved(temporary, f"strength-{strength:g}", pictures)))
            for strength, pictures in strip
        ]
        loras = tuple(
            EvaluatedLora(
                file=candidate.path.name,
                label=candidate.label,
                step=candidate.step,
                measures=measures,
                pictures=tuple(names),
            )
            for candidate, measures, names in zip(subject.candidates, of_candidates, kept, strict=True)
        )
        if not is_built_in:
            notes.append(_VALIDATED)
        evaluation = Evaluation(
            title=subject.title,
            model=base.title,
            trigger=subject.trigger,
            seed=drawing.seed,
            sampling_steps=artist.sampling.steps,
            prompts=prompts.shown,
            base=tuple(base_names),
            loras=loras,
            training=facts,
            verdict=chosen,
            sentence=sentence_of(chosen, loras, facts),
            strengths=tuple(rows),
            notes=tuple(dict.fromkeys(notes)),
        )
        write_atomic(temporary / EVALUATION_RECORD, json.dumps(asdict(evaluation), indent=1) + "\n")
        write_atomic(temporary / EVALUATION_PAGE, evaluation_page(_page(evaluation, temporary)))
        _write_sheet(temporary, evaluation)
    return evaluation


def check_evaluation_folder(folder: Path) -> None:
    """Raise OutputError if a folder holds anything but an evaluation, which would be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} must be a folder, but is a link or a file; name another output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / EVALUATION_RECORD).is_file():
        raise OutputError(f"{folder} holds other files than an evaluation; name another output")


def sentence_of(chosen: Verdict, loras: Sequence[EvaluatedLora], training: Training) -> str:
    """The verdict as a sentence with its reason."""
    if chosen.outcome == "changes nothing":
        subject = "This LoRA changes" if len(loras) == 1 else "These LoRAs change"
        return f"{subject} nothing: every picture is that of the base model; check that the file is for this model."
    if chosen.outcome == "no pictures":
        return "There is no recommendation, as there are no training pictures to compare with; look at the pictures."
    if chosen.outcome == "not comparable":
        if training.self_likeness is None:
            return "There is no recommendation, as a single training picture says too little; look at the pictures."
        return (
            f"There is no recommendation: two training pictures are alike by {training.self_likeness:.2f}, and the "
            f"measure was validated from {LEAST_SELF_LIKENESS:.2f} on; look at the pictures."
        )
    if chosen.outcome == "nothing learnt":
        return (
            "Nothing was learnt: what is drawn is no more like the training pictures than what the base model draws "
            f"({_best_likeness(loras):.2f}, and {training.base_likeness or 0:.2f} without a LoRA); train longer or "
            "with a higher rate."
        )
    if chosen.outcome == "ignores prompts":
        return "None can be recommended: all of them ignore prompts; train shorter or with a lower rate."
    assert chosen.best is not None
    best = loras[chosen.best]
    measures = best.measures
    reason = (
        f"it looks like your pictures ({measures.likeness or 0:.2f}, and {training.self_likeness or 0:.2f} among "
        "themselves)"
    )
    if measures.adherence is not None:
        reason += f" and still follows prompts ({measures.adherence:.2f})"
    text = (
        f"Use {best.label}: {reason}"
        if len(loras) > 1
        else f"{best.label[:1].upper()}{best.label[1:]} is good: {reason}"
    )
    if chosen.ignored_from is not None:
        text += f"; from {loras[chosen.ignored_from].label} on prompts are ignored"
    return f"{text}{'; it draws near copies of training pictures' if chosen.copied else ''}."


def plain_sentence(evaluation: Evaluation, *, is_style: bool = False) -> str:
    """The recommendation without its numbers, for who wants the file: what was learnt, then the step."""
    word = "style" if is_style else class_word(evaluation.trigger)
    subject, it = (f"your {word}", "it") if word else ("your photos", "them")
    if evaluation.verdict.best is not None:
        best = evaluation.loras[evaluation.verdict.best]
        who = (
            f"{best.label[:1].upper()}{best.label[1:]} looks most like {it}"
            if len(evaluation.loras) > 1
            else f"It looks like {it}"
        )
        follows = "" if best.measures.adherence is None else " and still follows prompts"
        copies = " It also draws near copies of your photos." if evaluation.verdict.copied else ""
        return f"It learnt {subject}. {who}{follows}.{copies}"
    if evaluation.verdict.outcome == "nothing learnt":
        return f"It has not learnt {subject} yet. Train it longer."
    if evaluation.verdict.outcome == "ignores prompts":
        return "It learnt too much. It ignores what prompts ask for, so train it shorter."
    if evaluation.verdict.outcome == "changes nothing":
        return "It changes nothing. Is the file for this model?"
    return "Look and choose. Your photos are too few or too different to be compared."


def class_word(trigger: str) -> str:
    """What the subject is: the trigger without its first word."""
    return trigger.partition(" ")[2]


@dataclass(frozen=True)
class Prompts:
    """The prompts of an evaluation."""

    trigger: str
    asked: tuple[str, ...]  # the trigger with a wish each
    of_class: tuple[str, ...]  # the class word, if there is one
    others: tuple[str, ...]

    @classmethod
    def of(cls, trigger: str, drawing: DrawingSettings, *, is_built_in: bool) -> Prompts:
        wishes = drawing.prompts or (BUILT_IN_WISHES if is_built_in else WISHES)
        word = class_word(trigger) if drawing.class_word is None else drawing.class_word
        return cls(trigger, tuple(asked_with(trigger, wish) for wish in wishes), (word,) if word else (), WITHOUT)

    @property
    def shown(self) -> tuple[str, ...]:
        """The columns."""
        return (*self.with_trigger, *self.of_class, *self.others)

    @property
    def described(self) -> tuple[str, ...]:
        """What is asked for, with the class word in place of the trigger."""
        word = "".join(self.of_class)
        return tuple(prompt.replace(self.trigger, word).strip(", ") for prompt in self.asked)

    @property
    def with_trigger(self) -> tuple[str, ...]:
        """Those that are drawn from several noises."""
        return (self.trigger, *self.asked)

    def pictures(self, loras: int, noises: int = NOISES) -> int:
        """How many are drawn of so many LoRAs, of the base model, and of the recommended LoRA at each strength."""
        each = len(self.shown) + (noises - 1) * len(self.with_trigger)
        return each * (loras + 1) + STRIP * len(STRENGTHS)


_VALIDATED = (
    "The rule of the recommendation was validated on drawings of the built-in model; look at the pictures as well."
)


class _Artist:
    """Draws all prompts of an evaluation with a LoRA: the columns on one seed, then the trigger's on others."""

    def __init__(
        self,
        base: Model,
        prompts: Prompts,
        drawing: DrawingSettings,
        device: torch.device,
        loras: int,
        progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._base, self._prompts, self._seed = base, prompts, drawing.seed
        self._device, self._progress, self._cancelled = device, progress, cancelled
        self.sampling = Sampling(steps=drawing.steps or base.defaults.steps, width=drawing.width, height=drawing.height)
        again = [(text, drawing.seed + more) for more in range(1, drawing.noises) for text in prompts.with_trigger]
        self._pictures = [*((text, drawing.seed) for text in prompts.shown), *again]
        self._total = self.sampling.steps * prompts.pictures(loras, drawing.noises)
        self._done = 0

    def drawn(self, lora: Path | None, notes: list[str] | None = None) -> list[Image.Image]:
        """Pictures of the columns, and of those with the trigger on further seeds."""
        texts, seeds = zip(*self._pictures, strict=True)
        return self._draw(*self._with(lora, 1.0, notes), texts, seeds)

    def strip(self, lora: Path) -> list[tuple[float, list[Image.Image]]]:
        """The first prompts at each strength."""
        texts = self._prompts.shown[:STRIP]
        return [
            (strength, self._draw(*self._with(lora, strength), texts, [self._seed] * len(texts)))
            for strength in STRENGTHS
        ]

    def _with(self, lora: Path | None, strength: float, notes: list[str] | None = None) -> tuple[Denoiser, TextEncoder]:
        denoiser, encoder = self._base.denoiser, self._base.text_encoder
        if lora is None:
            return denoiser, encoder
        applied = Lora.load(lora, self._base).applied(denoiser, encoder, strength=strength)
        if applied.note and notes is not None:
            notes.append(applied.note)
        return applied.denoiser, applied.encoder

    def _draw(
        self, denoiser: Denoiser, encoder: TextEncoder, texts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        before = self._done

        def tell(done: int, _: int) -> None:
            self._done = before + done
            if self._progress is not None:
                self._progress(self._done, self._total)

        drawn = generate_clips(
            denoiser,
            texts,
            self.sampling,
            text_encoder=encoder,
            seeds=seeds,
            device=self._device,
            progress=tell,
            cancelled=self._cancelled,
        )
        return [clip.frames[0] for clip in drawn]


def _check_draws(base: Model) -> None:
    base.family.check_parts(base.components, text=True, images=True)
    if base.named_expert is not None or base.control_form.is_required:
        raise OptionError(
            f"{base.title} ({base.family.title}) needs more than a prompt to draw; evaluate LoRAs of models that draw "
            "from prompts alone"
        )


def _trigger(lora: Path) -> dict[str, None]:
    """The trigger in a file's metadata, if there is one."""
    named = check_safetensors(lora).metadata.get("modelspec.trigger_phrase")
    return {named: None} if named else {}


def candidates_of(run: Path, title: str, prefix: str = "") -> list[LoraCandidate]:
    """The LoRAs of a run in the order of their steps, one of each step."""
    found: dict[int, LoraCandidate] = {}
    for path, step in loras_of_run(run, title):
        found.setdefault(step, LoraCandidate(path, f"{prefix}step {step:,}", step))
    return [found[step] for step in sorted(found)]


def _thumbnails(run: Path, data: Mapping[str, object]) -> list[Image.Image]:
    """The trained pictures that the folder of a run has small versions of; none of a run on pairs."""
    images = images_in(data)
    paths = [
        thumbnail_of(run, index) for index, image in enumerate(images) if image.use == "trained" and image.controls == 0
    ]
    return [open_still(path, EDGE) for path in paths if is_own(path, run)]


def _seen(pictures: Sequence[Image.Image], prompts: Prompts, recogniser: Recogniser) -> Drawn:
    count = len(prompts.with_trigger)
    more = len(prompts.shown)
    kept = [*pictures[:count], *pictures[more:]]  # with the trigger, noise by noise
    plain = kept[::count]
    asked = [picture for place, picture in enumerate(kept) if place % count]
    features = recogniser.features([*plain, *pictures[count:more]])
    without = features[len(plain) :]
    return Drawn(
        plain=features[: len(plain)],
        wishes=recogniser.wish_scores(prompts.described, asked),
        of_class=without[: len(prompts.of_class)],
        others=without[len(prompts.of_class) :],
    )


def _saved(folder: Path, stem: str, pictures: Sequence[Image.Image]) -> list[str]:
    names = [f"{stem}-{number}.webp" for number in range(1, len(pictures) + 1)]
    for name, picture in zip(names, pictures, strict=True):
        (folder / name).write_bytes(webp(picture, KEPT_EDGE))
    return names


def _best_likeness(loras: Sequence[EvaluatedLora]) -> float:
    return max(lora.measures.likeness or 0.0 for lora in loras)


def _page(evaluation: Evaluation, folder: Path) -> EvaluationPage:
    """The content of the page, with pictures in a folder."""
    own, base = evaluation.training.self_likeness, evaluation.training.base_likeness
    best = evaluation.verdict.best
    measured = None if best is None else evaluation.loras[best].measures
    facts = {
        "likeness": None if measured is None else measured.likeness,
        "of the training pictures to one another": own,
        "of the base model's pictures": base,
        "adherence": None if measured is None else measured.adherence,
    }
    strip = [(row.strength, [folder / name for name in row.pictures]) for row in evaluation.strengths]
    return EvaluationPage(
        title=evaluation.title,
        sentence=evaluation.sentence,
        is_recommended=best is not None,
        summary=f"{evaluation.model} · “{evaluation.trigger}” · seed {evaluation.seed}, "
        f"{count_text(evaluation.sampling_steps, 'sampling step')}",
        facts={name: f"{value:.2f}" for name, value in facts.items() if value is not None},
        prompts=evaluation.prompts,
        base=[folder / name for name in evaluation.base],
        rows=[
            EvaluationRow(
                label=lora.label,
                step=lora.step,
                likeness=lora.measures.likeness,
                adherence=lora.measures.adherence,
                numbers={
                    name: getattr(lora.measures, name) for name in ("diversity", "memorisation", "drift", "bleed")
                },
                pictures=[folder / name for name in lora.pictures],
            )
            for lora in evaluation.loras
        ],
        best=best,
        levels=[
            (name, value)
            for name, value in (("training pictures to one another", own), ("base model", base))
            if value is not None
        ],
        strengths=PictureTable(
            [f"{strength:g}" for strength, _ in strip],
            [(prompt, [paths[place] for _, paths in strip]) for place, prompt in enumerate(evaluation.prompts[:STRIP])],
            f"{evaluation.loras[best].label} at several strengths",
        )
        if best is not None
        else None,
        notes=evaluation.notes,
    )


def _write_sheet(folder: Path, evaluation: Evaluation) -> None:
    rows = {"base model": evaluation.base} | {lora.label: lora.pictures for lora in evaluation.loras}
    cell = max(64, min(256, _LARGEST_SHEET // max(len(rows), len(evaluation.prompts))))
    opened = [[Image.open(folder / name) for name in names] for names in rows.values()]
    sheet = contact_sheet(
        opened, list(rows), evaluation.prompts, title=evaluation.sentence, min_cell=min(128, cell), max_cell=cell
    )
    with atomic_path(folder / SHEET) as temporary:
        sheet.save(temporary, format="png")
