"""The methods of a run, in the order in which a step asks them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorasmith.core.errors import OptionError
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.methods.guidance_loss import GuidanceLoss
from lorasmith.training.methods.mask_prior import MaskPrior
from lorasmith.training.methods.method import Method
from lorasmith.training.methods.preference import Preference
from lorasmith.training.methods.preservation import Preservation
from lorasmith.training.methods.prior_prediction import PriorPrediction
from lorasmith.training.methods.slider import PairSlider, Slider
from lorasmith.training.methods.texts import OtherTexts
from lorasmith.training.methods.weight_change import WeightChange

_METHODS: tuple[type[Method], ...] = (
    GuidanceLoss,
    PriorPrediction,
    MaskPrior,
    Preservation,
    Slider,
    PairSlider,
    Preference,
    WeightChange,
)


def other_texts(data: Sequence[Sample] | EncodedDataset, config: ResolvedConfig) -> OtherTexts | None:
    """The further texts of samples that the methods of a run need; None for none. Raises OptionError."""
    return OtherTexts.of(data, {method.name: method.texts for method in methods_of(config)})


def methods_of(config: ResolvedConfig) -> tuple[Method, ...]:
    """Those that the settings turn on."""
    return tuple(method for kind in _METHODS if (method := kind.of(config)) is not None)


def check_methods(methods: Sequence[Method]) -> None:
    """Raise OptionError if a method has no effect, as another one takes the place of what it changes."""
    replacing = [one for one in methods if one.replaces_goal]
    idle = [*replacing[1:], *(one for one in methods if type(one).goal is not Method.goal)]
    if replacing and idle:
        raise OptionError(
            f"{replacing[0].name} takes the place of the loss of single pictures, which {idle[0].name} changes, got "
            "both; leave one of the two out"
        )


def check_opposites(samples: Iterable[Sample], config: ResolvedConfig) -> None:
    """Raise OptionError unless all samples are pairs where a method trains on these, and none where none does."""
    is_needed = any(method.needs_opposites for method in methods_of(config))
    if odd := next((one.name for one in samples if (one.opposite is not None) is not is_needed), None):
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
