"""What an H100 (SXM) was expected to take before any GPU had run this project, beside what it takes.

The estimates count operations and bytes: products at 680 TFLOP/s, attention by FlashAttention at 350 (forward) and 300
(backward), other kernels at 2.6 TB/s. A line that is off by more than half names what to look for first. This module
imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.results import Table

OFF = 1.5
"""Factor from an estimate from which a line is off."""


@dataclass(frozen=True)
class Estimate:
    """One number of one row.

    Attributes:
        part: of `benchmarks.gpu`.
        row: texts that the row's cells begin with, by column.
        column: of the number.
        low, high: of the estimate, in the unit of the column.
        slow: where to look if it takes longer, or has a lower rate.
    """

    part: str
    row: Mapping[str, str]
    column: str
    low: float
    high: float
    slow: str

    @property
    def is_rate(self) -> bool:
        return self.column == "rate"


_HOST = "Memcpy HtoD, aten::copy_ and cudaMalloc in the trace, and gaps between kernels"
_ATTENTION = "which backend attention has (`kernels`)"
_UNPACKING = "unpacking in several kernels (`kernels`, dequantization)"


def _loop(latents: str, side: str, low: float, high: float, slow: str, part: str = "loop:flux-12b") -> Estimate:
    return Estimate(part, {"latents": latents, "side": side}, "step, s", low, high, slow)


def _lever(name: str, low: float, high: float, slow: str) -> Estimate:
    return Estimate("quantized_1024:flux-12b", {"lever": name}, "step, s", low, high, slow)


def _rate(what: str, way: str, low: float, high: float, slow: str) -> Estimate:
    return Estimate("kernels", {"what": what, "way": way}, "rate", low, high, slow)


ESTIMATES = (
    _rate("product 4608", "bfloat16", 600, 750, "clocks and power of the card"),
    _rate("attention", "flash, forward", 300, 400, "the build of torch"),
    _rate("attention", "cudnn, forward", 500, 650, "the build of torch"),
    _rate("launch", "add to one number", 120, 250, "the host's processor"),
    _rate("dequantization nf4", "as in a run", 280, 420, _UNPACKING),
    _loop("128×128", "lorasmith", 0.41, 0.465, f"{_ATTENTION}; {_HOST}"),
    _loop("128×128", "lorasmith, checkpointing", 0.6, 0.68, _HOST),
    _loop("64×64", "lorasmith", 0.125, 0.2, _HOST),
    _lever("none", 0.41, 0.465, f"{_ATTENTION}; {_HOST}"),
    _lever("fp8", 0.465, 0.52, _UNPACKING),
    _lever("nf4", 0.6, 0.7, _UNPACKING),
    _lever("fp8-products", 0.35, 0.45, "rounding kernels, the transposed codes, bias added apart (`kernels`)"),
    _lever("int8-products", 0.35, 0.6, "the backward order of the int8 kernel (`kernels`)"),
    _loop("128×128", "lorasmith", 0.06, 0.09, "NHWC to NCHW copies", "layouts:sdxl"),
)
"""In the order of the parts. SDXL's is of one picture; four take 0.225 s."""


def comparison(facts: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the page that compare; none for other cards."""
    if "H100" not in str(facts.get("card", "")):
        return []
    table = Table({"part": "", "row": "", "measured": ".3g", "expected": "", "×": ".2f", "look for": ""})
    for one in ESTIMATES:
        for found in _numbers(one, results):
            nearest = min(max(found, one.low), one.high)
            slower = nearest / found if one.is_rate else found / nearest
            look = one.slow if slower > OFF else "" if slower > 1 / OFF else "too fast: is all of the work done?"
            expected = f"{one.low:g} to {one.high:g}"
            table.rows.append([one.part, ", ".join(one.row.values()), found, expected, slower, look])
    return ["## Beside what was expected", "", table.markdown(), ""] if table.rows else []


def _numbers(one: Estimate, results: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """The numbers that the estimate is of."""
    for result in results:
        for table in result["tables"] if result["part"] == one.part else ():
            names = list(table["columns"])
            for row in table["rows"] if {*one.row, one.column} <= {*names} else ():
                cells = dict(zip(names, row, strict=True))
                # Names of kernels go on with sizes; the side `lorasmith` is not `lorasmith, checkpointing`.
                is_there = all(
                    str(cells[name]).startswith(text) if one.is_rate else cells[name] == text
                    for name, text in one.row.items()
                )
                if is_there and cells[one.column]:
                    yield cells[one.column]
