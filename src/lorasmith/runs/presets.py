"""The recipe: what a run trains with that sets nothing, by preset, number of pictures, kind and model.

It is declared here alone, for every door and the documents. `PRESETS` say how long, `RECIPE` what else differs from the
defaults of the settings. A setting that somebody gives wins; the record of a run holds what came out, so that resuming
and reproducing do not read these tables.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.options import Option, options_of
from lorasmith.core.printable import count_text
from lorasmith.data.data_config import DataConfig
from lorasmith.families.locating import BUILT_IN
from lorasmith.runs.spec import SETTINGS, RunSpec
from lorasmith.training.adapter_settings import NONE_LORA
from lorasmith.training.config import TrainConfig

Kind = Literal["subject", "style"]
USUAL_PRESET = "balanced"
USUAL_IMAGES = 20  # images for which the steps of a preset are given where their number is unknown

_FEW, _MANY = 2, 9  # images from which there are few and many
_ROUND = 50  # pictures seen are multiples of it
_LORAS = 5  # that are kept, the finished one included
_LEAST_KEPT = 50  # steps of a run that keeps several


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How long a run trains."""

    name: str
    title: Annotated[str, "in words"]
    summary: Annotated[str, "its trade-off, in a sentence"]
    settings: Annotated[Mapping[str, Any], "by name; in responses also those that follow the number of images"]
    seen_per_image: Annotated[int, "how often each image is seen, within the following bounds"]
    least_seen: Annotated[int, "images seen in all, at least"]
    most_seen: Annotated[int, "images seen in all, at most"]

    def seen(self, images: int) -> int:
        """Images seen in a run on a number of images, repetitions counted."""
        wanted = self.seen_per_image * images
        return max(self.least_seen, min(self.most_seen, _ROUND * round(wanted / _ROUND)))


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="quick",
            title="Quick",
            summary="A first look in a third of the time: the subject is recognised, details are not there yet.",
            seen_per_image=15,
            least_seen=150,
            most_seen=500,
            settings={"rank": 8, "preview_share": 0.25},
        ),
        Preset(
            name="balanced",
            title="Balanced",
            summary="The usual choice: good likeness in a moderate time, and a LoRA that still follows prompts.",
            seen_per_image=40,
            least_seen=400,
            most_seen=2000,
            settings={"rank": 16},
        ),
        Preset(
            name="thorough",
            title="Thorough",
            summary="The finest details for twice the time and a file twice as large; stops by itself when it gets no "
            "better.",
            seen_per_image=80,
            least_seen=800,
            most_seen=5000,
            settings={"rank": 32, "patience": 4},
        ),
    )
}
"""The choices by name, the fastest first."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings of the recipe where all conditions hold; None is any.

    The settings of a rule belong together: where somebody gives the first one another value, the rule is left out.
    """

    settings: Mapping[str, Any]
    images: Literal["one", "few", "many"] | None = None
    kind: Kind | None = None
    model: str | None = None  # name of a family, or the built-in model
    preset: str | None = None


RECIPE: Sequence[Rule] = (
    # docs/lab-log.md: only few drawings of a subject were measured by the judge that had seen none of the subjects.
    Rule(
        model=BUILT_IN,
        kind="subject",
        images="few",
        settings={"train_text_encoder": True, "text_encoder_rate": 7e-4},
    ),
    Rule(
        model=BUILT_IN,
        kind="subject",
        images="few",
        preset="quick",
        settings={"learning_rate": 2.8e-3, "schedule": "linear", "text_encoder_rate": 1.4e-3},
    ),
)
"""What the recipe adds to a preset; of rules with equal settings, the last one holds."""

_OWN_WAY = ("existing_lora", "new_word")
"""Settings with which a run learns on or something else, for which the rules were not measured."""


def recipe_settings(
    preset: Preset,
    *,
    images: int | None = None,
    kind: Kind | None = "subject",
    model: str = "",
    given: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """All settings of the recipe that differ from the defaults, without those that are `given`.

    `images` is their number, `USUAL_IMAGES` if it is unknown, and `model` the name of `model_name`. Without a `kind`
    they are those of the preset alone.
    """
    number = USUAL_IMAGES if images is None else images
    amount = "one" if number < _FEW else "few" if number < _MANY else "many"
    settings = dict(preset.settings)
    for rule in RECIPE:
        holds = (
            kind is not None
            and rule.images in (None, amount)
            and rule.kind in (None, kind)
            and rule.model in (None, model)
            and rule.preset in (None, preset.name)
        )
        first, value = next(iter(rule.settings.items()))
        if holds and given.get(first, value) == value:
            settings |= rule.settings
    whole = {**settings, **given}
    each = whole.get("batch_size", 1) * whole.get("grad_accumulation_steps", 1)
    settings = {"steps": -(-preset.seen(number) // each), **settings}
    steps = {**settings, **given}["steps"]
    if steps >= _LEAST_KEPT:
        settings = {"save_every": steps // _LORAS, **settings}
    return {name: value for name, value in settings.items() if name not in given}


def recipe_names() -> frozenset[str]:
    """The settings that a recipe may choose."""
    own = {name for preset in PRESETS.values() for name in preset.settings}
    return frozenset({"steps", "save_every", *own, *(name for rule in RECIPE for name in rule.settings)})


def model_name(path: Path | None, family: str) -> str:
    """What rules call a model: the built-in one by its own name, others by their family's."""
    return BUILT_IN if path is not None and path.is_relative_to(BUILT_IN_BASE) else family


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the recipe chose for a run."""

    preset: str
    kind: Kind | None  # None if the run learns something else, for which there are no rules
    because: str  # why it is of this kind, in a clause; empty if somebody said so
    images: int
    settings: Mapping[str, Any]  # those that nobody gave

    @property
    def of_training(self) -> list[str]:
        """Names of those that are no settings of data."""
        return [name for name in self.settings if name in options_of(TrainConfig)]

    @property
    def sentence(self) -> str:
        """For the notes of a run."""
        guessed = f" ({self.because}; set kind if it is none)" if self.because else ""
        listed = ", ".join(f"{name} {_said(value)}" for name, value in self.settings.items())
        what = f"Preset {self.preset}" if self.kind is None else f"Recipe {self.preset} for a {self.kind}{guessed}"
        return (
            f"{what} from {count_text(self.images, 'picture')}: "
            f"{listed or 'every setting of it was given'}. preset none leaves it out."
        )


def with_recipe(spec: RunSpec, captions: Sequence[str], *, model: str) -> tuple[RunSpec, Chosen | None]:
    """The spec with the recipe of its preset among its settings, and what was chosen; None where no recipe holds.

    `captions` are those of each image, empty for none. Runs that continue another one have no recipe; those that learn
    on, learn a new word, or learn no subject (sliders, preferences) have the length and rank of the preset alone.
    """
    preset = PRESETS.get(spec.preset)
    if preset is None or spec.settings.get("existing_state") is not None:
        return spec, None
    kind, because = guessed_kind(captions, spec.data.trigger) if not spec.kind else (cast(Kind, spec.kind), "")
    is_other = any(spec.settings.get(name) not in (None, NONE_LORA) for name in _OWN_WAY)
    taught = None if is_other or spec.config.consequences().learns_no_subject else kind
    own = recipe_settings(preset, images=len(captions), kind=taught, model=model, given=spec.settings)
    if spec.settings.get("existing_lora") not in (None, NONE_LORA):
        own = {name: value for name, value in own.items() if not SETTINGS[name].of_fresh}
    chosen = Chosen(preset=preset.name, kind=taught, because=because, images=len(captions), settings=own)
    return replace(spec, kind=taught or "", settings={**own, **spec.settings}), chosen


_STYLE = re.compile(
    r"\b(styles?|styled|aesthetic|art|artwork|drawing|illustration|painting|sketch|watercolou?r|engraving|render)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{3,}")
_NEARLY_ALL, _HALF = 0.9, 0.5  # of the captions
_LEAST = 4  # captions, from which different ones say that there is no subject


def guessed_kind(captions: Sequence[str], trigger: str = "") -> tuple[Kind, str]:
    """Whether captions are of a subject or of a style, and why, in a clause.

    It is a style if the trigger names one; where the trigger is not of several words, as in "sks dog", also if nearly
    all captions name one, or if there is no trigger and no word is in half of them.
    """
    if word := _STYLE.search(trigger):
        return "style", f"the trigger says {word[0]}"
    if len(trigger.split()) > 1:
        return "subject", f"all pictures are of {trigger}"
    written = [caption for caption in captions if caption.strip()]
    named = Counter(word.casefold() for caption in written for word in sorted(set(_STYLE.findall(caption))))
    common = next((word for word, count in named.most_common(1) if count >= _NEARLY_ALL * len(written)), None)
    if common is not None and len(set(written)) > 1:
        return "style", f"captions differ and say {common}"
    if trigger:
        return "subject", f"all pictures are of {trigger}"
    words = Counter(
        word for caption in written for word in sorted({word.casefold() for word in _WORD.findall(caption)} - _EMPTY)
    )
    shared = words.most_common(1)[0] if words else ("", 0)
    if len(written) >= _LEAST and shared[1] < _HALF * len(written):
        return "style", "captions name different things"
    return "subject", f"captions share {shared[0]}" if shared[1] > 1 else "nothing says that it is a style"


_EMPTY = frozenset(
    {"and", "the", "with", "from", "for", "has", "are", "its", "his", "her", "photo", "picture", "image"}
)


def setting_groups() -> dict[str, list[Option]]:
    """Every setting that a page offers, by heading: data first, then training, in the order of declaration."""
    groups: dict[str, list[Option]] = {}
    for config in (DataConfig, TrainConfig):
        for declared in options_of(config).values():
            if declared.door == "any":
                groups.setdefault(declared.group, []).append(declared)
    return groups


def _said(value: object) -> str:
    return {True: "on", False: "off"}.get(value, "") if isinstance(value, bool) else str(value)


def run_s(picture_s: float, *, seen: int, preview_share: float) -> float:
    """Seconds of a run that sees so many pictures, with its previews."""
    return _START_S + seen * picture_s * (1 + preview_share)


_START_S = 8.0  # to load a model and to encode photos
