"""Tables of a benchmark: printed as Markdown row by row, and saved as JSON after each row.

A benchmark that is killed leaves the rows that it had. Only the standard library is imported: `benchmarks.gpu` reads
these files before other packages are known to be installed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

Cell = str | int | float | None


@dataclass
class Table:
    """Rows of numbers.

    Attributes:
        columns: name → format of its numbers, such as `.3f`; text is printed as it is, None as an empty cell.
        title: a line above it.
    """

    columns: Mapping[str, str]
    title: str = ""
    rows: list[list[Cell]] = field(default_factory=list)

    def markdown(self) -> str:
        """The whole table."""
        return "\n".join([*self.head(), *map(self.line, self.rows)])

    def head(self) -> list[str]:
        """The lines above the rows."""
        title = [self.title, ""] if self.title else []
        return [*title, _line(self.columns), _line(["---"] * len(self.columns)).replace(" ", "")]

    def line(self, row: list[Cell]) -> str:
        """One row."""
        return _line(_text(cell, form) for cell, form in zip(row, self.columns.values(), strict=True))


class Results:
    """The results of one benchmark.

    Args:
        arguments: of its command line, `json` (a path, or None) among them.
        versions: further facts, such as machine and torch.
    """

    def __init__(self, arguments: argparse.Namespace, **versions: str) -> None:
        settings = {name: _plain(value) for name, value in vars(arguments).items() if name != "json"}
        self._path: Path | None = arguments.json
        self._found = {"settings": settings, **versions}
        self._tables: list[Table] = []
        print(json.dumps(self._found))

    def table(self, columns: Mapping[str, str], title: str = "") -> None:
        """Begin a table, to which `add` adds from now on."""
        self._tables.append(Table(columns, title))
        print("", *self._tables[-1].head(), sep="\n", flush=True)

    def markdown(self, first: int = 0, end: int | None = None) -> str:
        """The tables from one to another."""
        return "\n\n".join(table.markdown() for table in self._tables[first:end])

    def add(self, *row: Cell) -> None:
        """A row of the newest table."""
        table = self._tables[-1]
        table.rows.append([None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row])
        print(table.line(table.rows[-1]), flush=True)
        if self._path is not None:
            write_json(self._path, {**self._found, "tables": [asdict(table) for table in self._tables]})


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and tables there as well")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(cell: Cell, form: str) -> str:
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else format(cell, form)


def _plain(value: object) -> object:
    """A setting as a JSON value."""
    return str(value) if isinstance(value, Path) else value
