"""What `lorasmith` works without, and the sentences that say how to install it.

Two are distributions of this repository, found by their import packages: `lorasmith-tiny` has the built-in model and the
example pictures, in folders laid out like a base folder; `lorasmith-editor` has what ComfyUI's editor loads. Others are
packages of the extra `models`, which the model families import where they use them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path

from lorasmith.core.errors import ModelError


@dataclass(frozen=True)
class Companion:
    """A distribution of this repository that may be installed beside `lorasmith`."""

    name: str
    folder: Path  # of its files; does not exist if there is trouble
    trouble: str = ""  # why it is not used, in a sentence with the remedy

    @classmethod
    def find(cls, name: str, extra: str, *, series: int) -> Companion:
        """The installed one, if the first number of its version is `series`."""
        nowhere = Path(__file__).parent / name
        try:
            package = import_module(name.replace("-", "_"))
        except ImportError:
            return cls(name, nowhere, f"{name} is not installed; run {_command(name, extra)}")
        found = str(package.__version__)
        if found.partition(".")[0] == str(series):
            return cls(name, Path(str(resources.files(package))))
        age = "older" if int(found.partition(".")[0]) < series else "newer"
        fits = f"this lorasmith needs {name} {series}.x, but {found}, which is {age}, is installed"
        return cls(name, nowhere, f"{fits}; run {_command(name, extra)}")


def _command(name: str, extra: str) -> str:
    return f'pip install ./{name} in a copy of this version\'s repository, or pip install "lorasmith[{extra}]"'


TINY = Companion.find("lorasmith-tiny", "demo", series=1)
EDITOR = Companion.find("lorasmith-editor", "editor", series=1)

MODEL_PACKAGES = frozenset({"diffusers", "transformers", "sentencepiece"})
"""Packages of the extra `models`."""


@contextmanager
def models_extra_named(what: str) -> Iterator[None]:
    """A missing package of the extra `models` is a ModelError that says how to install it for `what`."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in MODEL_PACKAGES:
            raise
        raise ModelError(
            f'{what} needs the package {package}, which is not installed; run pip install "lorasmith[models]"'
        ) from error
