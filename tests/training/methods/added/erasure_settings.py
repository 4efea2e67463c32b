"""Settings of erasing a concept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorasmith.core.options import option
from lorasmith.training.section import Consequences, Section


@dataclass(frozen=True, kw_only=True)
class ErasureSettings(Section, group="Methods", costs=True):
    """What is erased."""

    erase: str | None = option(None, is_prompt=True, help="Prompt that the LoRA keeps the model from drawing.")
    erase_guidance: float = option(1.0, min=0.0, max=100.0, help="How far predictions are led away from it.")

    def own_idle(self) -> Iterator[str]:
        if self.erase is None:
            yield from self.has_no_effect("erase_guidance", without="erase")

    def own_consequences(self) -> Consequences:
        if self.erase is None:
            return Consequences()
        return Consequences(
            strengths=(-1.0, 1.0), prompt=self.erase, learns_no_subject=True, takes_further_passes="erase"
        )
