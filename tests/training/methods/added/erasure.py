"""Erasing a concept from a model (Gandikota et al. 2023, arXiv:2303.07345)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import Tensor

from lorasmith.training.methods.method import BuiltInMethod, Passes
from lorasmith.training.methods.texts import TextRule

if TYPE_CHECKING:
    from lorasmith.training.config import ResolvedConfig


@dataclass(frozen=True)
class Erasure(BuiltInMethod):
    """Predictions for a prompt are led away from it."""

    prompt: str
    guidance: float

    name = "erase"
    replaces_goal = True

    @classmethod
    def of(cls, config: ResolvedConfig) -> Self | None:
        return None if config.erase is None else cls(config.erase, config.erase_guidance)

    @property
    def texts(self) -> Mapping[str, TextRule]:
        return {"erased": lambda caption, trigger: self.prompt, "blank": lambda caption, trigger: ""}

    def terms(self, passes: Passes) -> Iterator[Tensor]:
        blank = passes.frozen("blank")
        target = blank - self.guidance * (passes.frozen("erased") - blank)
        yield (passes.trained("erased") - target).square().flatten(1).mean(1)
