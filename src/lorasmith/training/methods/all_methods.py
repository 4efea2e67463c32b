"""The methods of a run, in the order in which a step asks them."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterable, Mapping, Sequence

from lorasmith.adapters.adapter import Adapter
from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.methods.method import Method
from lorasmith.training.methods.method_settings import METHODS
from lorasmith.training.methods.texts import OtherTexts
from lorasmith.training.trainable import Facts


def other_texts(data: Sequence[Sample] | EncodedDataset, config: ResolvedConfig) -> OtherTexts | None:
    """The further texts of samples that the methods of a run need; None for none. Raises OptionError."""
    return OtherTexts.of(data, {method.name: method.texts for method in methods_of(config)})


def methods_of(config: ResolvedConfig) -> tuple[Method, ...]:
    """Those that the settings turn on."""
    return tuple(method for kind in _kinds() if (method := kind.of(config)) is not None)


@functools.cache
def _kinds() -> tuple[type[Method], ...]:
    return tuple(pkgutil.resolve_name(f"{__package__}.{name}") for name in METHODS)


def check_methods(methods: Sequence[Method], facts: Facts, adapters: Mapping[str, Adapter]) -> None:
    """Raise OptionError if a method has no effect, as another one takes the place of what it changes, or does not fit
    the model or its adapters.
    """
    replacing = [one for one in methods if one.replaces_goal]
    idle = [*replacing[1:], *(one for one in methods if type(one).goal is not Method.goal)]
    if replacing and idle:
        raise OptionError(
            f"{replacing[0].name} takes the place of the loss of single pictures, which {idle[0].name} changes, got "
            "both; leave one of the two out"
        )
    for method in methods:
        method.check(facts, adapters)


def check_opposites(samples: Iterable[Sample], config: ResolvedConfig) -> None:
    """Raise OptionError unless all samples are pairs where a method trains on these, and none where none does."""
    is_needed = any(method.needs_opposites for method in methods_of(config))
    if odd := next((sample.name for sample in samples if (sample.opposite is not None) is not is_needed), None):
        raise OptionError(
            f"pairs {config.pairs} needs two pictures for each sample, but {odd} has no opposite; load the images with "
            "controls opposite, or leave pairs out"
            if is_needed
            else f"{odd} has an opposite, which a run has with pairs slider or dpo alone; choose one of them, or load "
            "the images without controls opposite"
        )


def texts_needed_by(config: ResolvedConfig) -> str | None:
    """Name of a setting for which texts are encoded in training, besides captions ahead of it; None for none."""
    if config.text_setting is not None:
        return config.text_setting
    return next((method.name for method in methods_of(config) if method.texts), None)
