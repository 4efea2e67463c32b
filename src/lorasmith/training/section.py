"""What a section of settings is: declarations, the rules between them, and what follows from them for other rooms.

A section stands beside the code that it sets, and imports no torch. Whoever runs or shows a training asks all sections
at once (`idle_settings`, `consequences`, `check_for`) and names none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from lorasmith.core.errors import OptionError
from lorasmith.core.options import check_options, options_of

if TYPE_CHECKING:
    from lorasmith.families.forms import Diffusion


@dataclass(frozen=True, kw_only=True)
class Consequences:
    """What the settings that are on mean for others. Of several values of a field, that of the first section counts."""

    strengths: tuple[float, ...] = ()  # at which a finished LoRA is drawn, instead of the usual ones
    prompt: str = ""  # that previews draw, instead of the trigger or a caption
    are_pairs: bool = False  # each sample has an opposite, which no model is given
    learns_no_subject: bool = False  # neither losses nor likeness of single images say what was learnt
    takes_further_passes: str = ""  # a setting with which a step is more than one plain pass
    runs_on_host: str = ""  # a setting for which the host computes something in each step

    @property
    def is_slider(self) -> bool:
        """Whether the LoRA's strength is the amount of an attribute, negative ones included."""
        return any(strength < 0 for strength in self.strengths)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of a section of settings; keywords of the class are details that all of its options share."""

    SHARED: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **shared: Any) -> None:
        super().__init_subclass__()
        cls.SHARED = shared

    def __post_init__(self) -> None:
        check_options(self)

    def own_idle(self) -> Iterator[str]:
        """A sentence for each setting of this section that has no effect beside the others."""
        yield from ()

    def own_consequences(self) -> Consequences:
        """What follows from the settings of this section."""
        return Consequences()

    def own_check(self, diffusion: Diffusion) -> None:
        """Raise OptionError if a setting of this section does not fit what a model predicts."""

    def is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == options_of(type(self))[name].default)

    def has_no_effect(self, *names: str, without: str) -> Iterator[str]:
        """A sentence for each of these settings that is set."""
        for name in names:
            if not self.is_default(name):
                value = getattr(self, name)
                yield f"{name} {f'{value:g}' if isinstance(value, float) else value} has no effect without {without}."

    def idle_settings(self) -> Iterator[str]:
        """A sentence for each setting that has no effect beside the others, in the order of the sections."""
        for section in sections_of(type(self)):
            yield from section.own_idle(self)

    def consequences(self) -> Consequences:
        """What follows from all settings."""
        return _first_of([section.own_consequences(self) for section in sections_of(type(self))])

    def check_for(self, diffusion: Diffusion) -> None:
        """Raise OptionError if a setting does not fit what a model predicts."""
        for section in sections_of(type(self)):
            section.own_check(self, diffusion)


def sections_of(config: type[Section]) -> list[type[Section]]:
    """The sections that a configuration is made of, in the order of their settings."""
    own = {"own_idle", "own_consequences", "own_check"}
    return [kind for kind in reversed(config.__mro__) if issubclass(kind, Section) and own & vars(kind).keys()]


def recorded_consequences(config: type[Section], values: Mapping[str, Any]) -> Consequences:
    """What followed from recorded settings; those of sections that can no longer be read are left out."""
    found = []
    for section in sections_of(config):
        own = {name: values[name] for name in options_of(section) if name in values}
        try:
            found.append(section(**own).own_consequences())
        except OptionError:
            continue
    return _first_of(found)


def _first_of(each: list[Consequences]) -> Consequences:
    values = {field.name: [getattr(of_section, field.name) for of_section in each] for field in fields(Consequences)}
    chosen: dict[str, Any] = {
        name: next(filter(None, values_of)) for name, values_of in values.items() if any(values_of)
    }
    return Consequences(**chosen)
