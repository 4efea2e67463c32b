"""Output preservation: what the model draws for another text stays as it was, without pictures of the class.

A term holds the trained prediction for that text to the frozen model's, on the same noise and level, without masks and
weights of noise levels. The text is the caption with the trigger replaced by the class (ai-toolkit's differential
output preservation), or the empty text (its blank prompt preservation), which keeps the unconditional side of guidance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import Tensor

from lorasmith.data.captions import with_class
from lorasmith.training.methods.method import BuiltInMethod, Passes
from lorasmith.training.methods.texts import TextRule

if TYPE_CHECKING:
    from lorasmith.training.config import ResolvedConfig

_TEXT = "preserved"


@dataclass(frozen=True)
class Preservation(BuiltInMethod):
    """Preservation of the class `of_class`, or of the empty text if it is None."""

    of_class: str | None
    weight: float

    name = "preserve"

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        if config.preserve == "none":
            return None
        return cls(config.preserve_class if config.preserve == "class" else None, config.preserve_weight)

    @property
    def texts(self) -> Mapping[str, TextRule]:
        of_class = self.of_class
        return {_TEXT: lambda caption, trigger: "" if of_class is None else with_class(caption, trigger, of_class)}

    def terms(self, passes: Passes) -> Iterator[Tensor]:
        kept = passes.frozen(_TEXT)
        yield self.weight * (passes.trained(_TEXT) - kept).square().flatten(1).mean(1)
