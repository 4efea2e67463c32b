"""Settings of token routing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorasmith.core.options import option
from lorasmith.training.section import Consequences, Section


@dataclass(frozen=True, kw_only=True)
class TokenRouteSettings(Section, group="Speed", costs=True):
    """Which tokens skip which blocks."""

    tread_rate: float = option(
        0.0,
        min=0.0,
        max=0.9,
        help="Share of a picture's tokens that skip the blocks in the middle of a transformer (TREAD, "
        "arXiv:2501.04765), others in each step, which makes steps faster. Text, controls and, as far as the share "
        "allows, what is inside of masks go through all blocks. 0 disables it; 0.1 to 0.25 suit LoRAs.",
    )
    tread_first: int = option(
        2,
        min=-1000,
        max=1000,
        help="First block that tokens skip, counted from 0 over all blocks, or from -1 backwards.",
    )
    tread_last: int = option(
        -2, group="Speed", min=-1000, max=1000, help="Last block that tokens skip, counted likewise."
    )

    def own_idle(self) -> Iterator[str]:
        if not self.tread_rate:
            yield from self.has_no_effect("tread_first", "tread_last", without="tread_rate")

    def own_consequences(self) -> Consequences:
        return Consequences(takes_further_passes="tread_rate" if self.tread_rate else "")
