"""The methods of a run, in the order in which a step asks them."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterable, Mapping, Sequence

from lorasmith.adapters.adapter import Adapter
from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import Code, code_of, parsed_arguments
from lorasmith.core.printable import one_line_of
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.methods.method import BuiltInMethod, Method
from lorasmith.training.methods.method_settings import METHODS
from lorasmith.training.methods.own_method_settings import OWN_METHODS
from lorasmith.training.methods.texts import OtherTexts
from lorasmith.training.trainable import Facts


def other_texts(data: Sequence[Sample] | EncodedDataset, config: ResolvedConfig) -> OtherTexts | None:
    """The further texts of samples that the methods of a run need; None for none. Raises OptionError."""
    return OtherTexts.of(data, {method.name: method.texts for method in methods_of(config)})


def methods_of(config: ResolvedConfig) -> tuple[Method, ...]:
    """Those that the settings turn on. Raises OptionError for one that cannot be made with its arguments."""
    built_in = (method for kind in _kinds() if (method := kind.of(config)) is not None)
    return (*built_in, *([] if config.method is None else [_own_method(config.method, config.method_args)]))


@functools.cache
def _kinds() -> tuple[type[BuiltInMethod], ...]:
    return tuple(pkgutil.resolve_name(f"{__package__}.{name}") for name in METHODS)


def _own_method(name: Code, arguments: str | None) -> Method:
    maker = code_of(name, OWN_METHODS)
    if not callable(maker):
        raise OptionError(f"method must be a class of methods or a function that makes one, which {name} is not")
    keywords = parsed_arguments(arguments, maker, str(name), setting="method_args", ours={}) if arguments else {}
    try:
        method = maker(**keywords)
    except Exception as error:  # of any kind
        raise OptionError(f"method {name} cannot be made with its method_args: {one_line_of(error)}") from error
    if not isinstance(method, Method):
        raise OptionError(
            f"method must be of a subclass of {Method.__module__}.Method, but {name} is of {type(method).__name__}"
        )
    return method


def check_methods(methods: Sequence[Method], facts: Facts, adapters: Mapping[str, Adapter]) -> None:
    """Raise OptionError if a method has no effect, as another one takes the place of what it changes, or does not fit
    the model or its adapters.
    """
    replacing = [method for method in methods if method.replaces_goal]
    idle = [*replacing[1:], *(method for method in methods if type(method).goal is not Method.goal)]
    if replacing and idle:
        raise OptionError(
            f"{replacing[0].name} takes the place of the loss of single pictures, which {idle[0].name} changes, got "
            "both; leave one of the two out"
        )
    for index, method in enumerate(methods):
        method.check(facts, adapters)
        taken = {text: other.name for other in methods[:index] for text in other.texts}
        if text := next((text for text in method.texts if text in taken), None):
            raise OptionError(
                f"{method.name} and {taken[text]} both have a text named {text!r}; leave one of the two out"
            )


def check_opposites(samples: Iterable[Sample], config: ResolvedConfig) -> None:
    """Raise OptionError unless all samples are pairs where a method trains on these, and none where none does."""
    needed_by = next((method.name for method in methods_of(config) if method.needs_opposites), "")
    needing = f"pairs {config.pairs}" if needed_by == "pairs" else needed_by
    if odd := next((sample.name for sample in samples if (sample.opposite is not None) is not bool(needing)), None):
        raise OptionError(
            f"{needing} needs two pictures for each sample, but {odd} has no opposite; load the images with "
            f"controls opposite, or leave {needing.split()[0]} out"
            if needing
            else f"{odd} has an opposite, which a run has with pairs slider or dpo alone; choose one of them, or load "
            "the images without controls opposite"
        )


def texts_needed_by(config: ResolvedConfig) -> str | None:
    """Name of a setting for which texts are encoded in training, besides captions ahead of it; None for none."""
    if config.text_setting is not None:
        return config.text_setting
    return next((method.name for method in methods_of(config) if method.texts), None)
