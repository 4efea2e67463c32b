"""Models, data and arguments from callers of the library, as training needs them, or refused with the remedy.

Also the signatures and documentation of functions whose settings are declared elsewhere.
"""

from __future__ import annotations

import inspect
import itertools
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_type_hints

from torch import nn
from torch.utils.data import DataLoader

from lorasmith.core.arguments import check_arguments
from lorasmith.core.errors import DataError, ModelError
from lorasmith.core.options import Option, options_of
from lorasmith.core.printable import described
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.loading import load_model
from lorasmith.families.model import Denoiser, Model
from lorasmith.training.lora_handle import Lora
from lorasmith.training.results import TrainResult
from lorasmith.training.trainable import Trainable, TrainableDenoiser

A = TypeVar("A")

_WIDTH = 96  # columns: `help` indents by four


def trainable_of(value: object) -> Trainable:
    """What is trained on: a `Trainable` as it is, or that of a model. Raises ModelError."""
    return value if isinstance(value, Trainable) else TrainableDenoiser(denoiser_of(value))


def denoiser_of(value: object) -> Denoiser:
    """The denoiser of a model, with its LoRAs. Raises ModelError."""
    return value if isinstance(value, Denoiser) else model_of(value).denoiser


def model_of(value: object) -> Model:
    """A model as it is, or loaded: of a denoiser, a name or path, or a pipeline of diffusers. Raises ModelError."""
    if isinstance(value, Model):
        return value
    if isinstance(value, Denoiser):
        return value.base
    if isinstance(value, str | os.PathLike) or _is_pipeline(value):
        return load_model(value)  # type: ignore[arg-type]
    remedy = next((remedy for types, remedy in _NO_MODELS.items() if isinstance(value, types)), _LOAD)
    raise ModelError(
        f"a model must be a Model, the name or path of one, or a pipeline of diffusers, got {described(value)}; "
        f"{remedy}"
    )


def check_data(value: object) -> None:
    """Raise DataError for a model in place of pictures, and for samples, which are encoded already."""
    if isinstance(value, EncodedDataset | Sample):
        raise DataError(f"images must not be encoded yet, got {described(value)}; give it to train as it is")
    if isinstance(value, Model | Denoiser | Trainable | nn.Module) or _is_pipeline(value):
        raise DataError(
            f"data must be samples or pictures, got {described(value)}; give the model and the data in the order of "
            "the arguments"
        )


def samples_of(value: object, load: Callable[[object], EncodedDataset]) -> EncodedDataset:
    """A dataset as it is, of samples, or of whatever else `load` encodes. Raises DataError."""
    if isinstance(value, EncodedDataset):
        return value
    if isinstance(value, Sample):
        value = [value]
    if isinstance(value, list | tuple | Iterator):
        items = iter(value)
        first = next(items, items)
        if first is items:
            raise DataError(
                "training needs at least one sample, got none; a list may be empty, a generator read before"
            )
        if isinstance(first, Sample):
            return EncodedDataset((first, *items), origin="samples made one by one")
        if value is items:
            value = itertools.chain([first], items)
    return load(value)


def _is_pipeline(value: object) -> bool:
    return not isinstance(value, type) and hasattr(value, "components") and hasattr(value, "config")


_LOAD = "load one: lorasmith.load_model('sd15.safetensors')"
_NO_MODELS: dict[Any, str] = {
    nn.Module: "describe a module of your own by a lorasmith.Trainable",
    (EncodedDataset, Sample, list, tuple, DataLoader): "the model comes first, then the data",
    (Lora, TrainResult): "give its base model, and the LoRA's file as existing_lora",
    Trainable: "a Trainable is trained on alone: make a lorasmith.Sample of each of its inputs, and call its module",
    dict: "tensors alone do not say what computes with them; save them as a checkpoint and load that",
}
"""What is given instead of a model, and what to do about it."""


def with_settings(function: Callable[..., Any], arguments: Any) -> Any:
    """The function with the fields of the dataclass in place of `**arguments`, non-options first, and explained."""
    plain, hints = inspect.signature(function, eval_str=True), get_type_hints(arguments)
    first = [parameter for parameter in plain.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    others = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in inspect.signature(arguments).parameters.values()
    ]
    settings = options_of(arguments)
    others.sort(key=lambda other: other.name in settings)
    function.__signature__ = plain.replace(parameters=[*first, *others])  # type: ignore[attr-defined]
    if (own := inspect.getdoc(function)) is not None:  # None with -OO
        around = (inspect.getdoc(arguments) or "").partition("\nAttributes:\n")[2]
        further = f"Further arguments:\n{around}".replace("\n\n", "\n").rstrip()
        function.__doc__ = "\n\n".join((_narrow(own), _narrow(further), _settings_text(arguments)))
    return function


def _settings_text(arguments: Any) -> str:
    """The declarations of a class's options: name, type, default, range and meaning, by group."""
    groups: dict[str, list[str]] = {}
    for declared in options_of(arguments).values():
        text = f"    {declared.name} ({_facts(declared)}): {declared.help}"
        groups.setdefault(declared.group or "Settings", []).append(text)
    return "\n\n".join(_narrow("\n".join([f"{group}:", *texts])) for group, texts in groups.items())


def _narrow(text: str) -> str:
    """A docstring wrapped again: paragraphs, headings that end in a colon, and indented items below them."""
    lines: list[tuple[int, str]] = []
    for line in text.splitlines():
        indent, words = len(line) - len(line.lstrip()), line.strip()
        before, last = lines[-1] if lines else (0, "")
        if words and last and (indent > before or indent == before == 0) and not (before == 0 and last.endswith(":")):
            lines[-1] = (before, f"{last} {words}")
        else:
            lines.append((indent, words))
    return "\n".join(
        textwrap.fill(words, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent and indent + 4))
        for indent, words in lines
    )


def _facts(declared: Option) -> str:
    facts = [declared.type.__name__, f"default {declared.default!r}"]
    if declared.choices:
        facts.append(f"one of {', '.join(map(repr, declared.choices))}")
    elif declared.min is not None or declared.max is not None:
        facts.append(declared.range_text())
    return ", ".join(facts)


def taken(kind: type[A], function: str, arguments: Mapping[str, Any]) -> tuple[A, dict[str, Any]]:
    """The arguments that are no settings, by their class and checked, and the settings."""
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in options_of(kind)}
    own = {name: value for name, value in arguments.items() if name in hints}
    check_arguments(own, hints, function)
    return kind(**own), {name: value for name, value in arguments.items() if name not in hints}
