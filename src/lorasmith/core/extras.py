"""What `lorasmith` works without, and the sentences that say how to install it.

Two are distributions of this repository, found by their import packages: `lorasmith-tiny` has the built-in model and
the example pictures, in folders laid out like a base folder; `lorasmith-editor` has what ComfyUI's editor loads. The
packages of the extra `models` are imported by the model families where they use them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata, resources
from importlib.util import find_spec
from pathlib import Path

from lorasmith.core.errors import ModelError


@dataclass(frozen=True)
class Companion:
    """A distribution of this repository that may be installed beside `lorasmith`."""

    name: str
    commands: tuple[str, str]  # that install it: in a copy of the repository, and from an index
    folder: Path  # of its files; does not exist if there is a problem
    version: str = ""  # empty if it is not installed
    problem: str = ""  # why it is not used

    @classmethod
    def find(cls, name: str, extra: str) -> Companion:
        """The installed one, if it is of the release that this lorasmith's extra asks for."""
        commands = f"pip install ./{name}", f'pip install "lorasmith[{extra}]"'
        nowhere = Path(__file__).parent / name
        try:
            package = import_module(name.replace("-", "_"))
            version = metadata.version(name)
        except ImportError:  # the distribution is missing, too, where pip left an empty folder behind
            return cls(name, commands, nowhere, problem=f"{name} is not installed")
        wanted = _release_wanted(name)
        if version.split(".")[: len(wanted)] == wanted:
            return cls(name, commands, Path(str(resources.files(package))), version)
        problem = f"{name} {version} does not fit, as this lorasmith needs {'.'.join(wanted)}.x"
        return cls(name, commands, nowhere, version, problem)

    @property
    def remedy(self) -> str:
        """What to run."""
        return f"run {self.commands[0]} in a copy of the repository of this version, or {self.commands[1]}"

    @property
    def trouble(self) -> str:
        """Problem and remedy as a sentence, empty if there is none."""
        return self.problem and f"{self.problem}; {self.remedy}"


def _release_wanted(name: str) -> list[str]:
    """The numbers that a companion's version must begin with, by the metadata of the installation; empty: any."""
    try:
        required = metadata.requires("lorasmith") or []
    except metadata.PackageNotFoundError:  # sources that are not installed
        return []
    found = (re.match(rf"{name} *~= *([\d.]+)\.\d+", requirement) for requirement in required)
    return next((match[1].split(".") for match in found if match), [])


TINY = Companion.find("lorasmith-tiny", "demo")
EDITOR = Companion.find("lorasmith-editor", "editor")


class MissingPackageError(ModelError):
    """A package of the extra `models` is needed and not installed."""


@contextmanager
def model_packages(what: str) -> Iterator[None]:
    """Imports for `what`: those of packages that are not installed raise MissingPackageError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _MODEL_PACKAGES:
            raise
        raise MissingPackageError(
            f"{what} needs the package {error.name}, which is not installed; {_MODELS_REMEDY}"
        ) from error


def models_trouble() -> str:
    """Why no model of a built-in family can be loaded, with the remedy; empty if they can."""
    missing = [name for name in _MODELS if find_spec(name) is None]
    return f"the packages for models are not installed ({', '.join(missing)}); {_MODELS_REMEDY}" if missing else ""


_MODELS_REMEDY = 'run pip install "lorasmith[models]"'
_MODELS = ("diffusers", "transformers", "sentencepiece")
_MODEL_PACKAGES = frozenset({*_MODELS, "huggingface_hub", "tokenizers"})
"""Packages of the extra `models`, and what these install of their own."""
