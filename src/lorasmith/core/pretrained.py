"""Untrusted folders as transformers saves models, processors and tokenizers: loaded by one function.

Their configurations may name code and further folders, which transformers loads on the way without the arguments that
the first one was loaded with. So what they name is checked before anything is loaded, and code is refused wherever
transformers would ask whether to run it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

from lorasmith.core.errors import ModelError
from lorasmith.core.files import read_regular
from lorasmith.core.foreign_json import parse_foreign_json


def load_pretrained(kind: Any, folder: Path, **settings: Any) -> Any:
    """What `kind.from_pretrained` makes of a folder: a model from safetensors, a processor, a tokenizer.

    Raises ModelError if the folder names other models, files elsewhere or nested code, and what transformers raises, as
    for code of the folder itself.
    """
    prepare_libraries()
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} must be a whole model but is an adapter on another one; merge it into that first")
    for path in sorted(folder.iterdir()):
        # Further names that transformers reads: versions (`config.5.0.0.json`), and any case where the disk has none.
        if "config" in path.name.lower() and path.name.lower().endswith(".json"):
            _check_configuration(path)
    return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)


def prepare_libraries() -> None:
    """For the whole process, disable progress bars of transformers and diffusers, which would interrupt a training
    run's own, and transformers' question whether to run the code of a folder: without an explicit
    `trust_remote_code`, that is refused. Networks of diffusers are imported without all others.
    """
    for package in ("diffusers", "transformers"):
        with suppress(ModuleNotFoundError):  # a family of one's own may need neither
            import_module(f"{package}.utils.logging").disable_progress_bar()
    for package in NETWORKS:
        with suppress(ModuleNotFoundError):
            import_by_modules(package)
    with suppress(ModuleNotFoundError):
        # The seconds that it waits for an answer.
        setattr(import_module("transformers.dynamic_module_utils"), "TIME_OUT_REMOTE_CODE", 0)  # noqa: B010


def import_by_modules(package: str) -> None:
    """Let a package whose `__init__` only passes names of its modules on do so when it is asked for one, unless it is
    imported already: until then, importing one of its modules imports no other.
    """
    if package in sys.modules or (spec := find_spec(package)) is None or spec.loader is None:
        return
    loader, module = spec.loader, module_from_spec(spec)

    def lookup(name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # of those who look through all modules
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        vars(module).pop("__getattr__", None)
        loader.exec_module(module)
        return getattr(module, name)

    vars(module)["__getattr__"] = lookup
    sys.modules[package] = module
    parent, _, child = package.rpartition(".")
    setattr(sys.modules[parent], child, module)


NETWORKS = ("diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets")
"""Packages of some hundred networks, of which a model needs one or two."""
_MOST_BYTES = 64 * 2**20
_UNUSED = ("special_tokens_map_file",)  # written by older versions, read by none


def _check_configuration(path: Path) -> None:
    """Raise ModelError if a configuration cannot be read, or names anything but classes of transformers."""
    try:
        values = parse_foreign_json(read_regular(path, at_most=_MOST_BYTES), finite=False)
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise ModelError(f"{path} {reason}; get the model again") from error
    for name, value, is_nested in _members(values):
        if name == "auto_map" and is_nested:
            named = "code in a nested configuration"
        elif (name == "backbone" and isinstance(value, str)) or (name.startswith("audio_tokenizer") and value):
            named = f"another model ({name})"
        elif (
            name.endswith("_file")
            and isinstance(value, str)
            and name not in _UNUSED
            and _is_elsewhere(path.parent, value)
        ):
            named = f"a file of another folder ({name})"
        else:
            continue
        raise ModelError(f"{path} must describe one model, but names {named}; use a model without it")


def _members(values: Any) -> Iterator[tuple[str, Any, bool]]:
    """Name and value of all members of JSON, and whether they are in another member."""
    waiting = [(values, False)]
    while waiting:
        container, is_nested = waiting.pop()
        if isinstance(container, dict):
            yield from ((name, value, is_nested) for name, value in container.items())
        if isinstance(container, dict | list):
            inner = container.values() if isinstance(container, dict) else container
            waiting += [(value, True) for value in inner]


def _is_elsewhere(folder: Path, name: str) -> bool:
    """Whether `name` is a place outside of a folder where something is."""
    try:
        place = Path(name).absolute()
        return place.exists() and not place.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False
