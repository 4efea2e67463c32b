"""The methods of a run, in the order in which a step asks them."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.methods.guidance_loss import GuidanceLoss
from lorasmith.training.methods.mask_prior import MaskPrior
from lorasmith.training.methods.method import Method
from lorasmith.training.methods.preservation import Preservation
from lorasmith.training.methods.prior_prediction import PriorPrediction
from lorasmith.training.methods.slider import Slider
from lorasmith.training.methods.texts import OtherTexts
from lorasmith.training.methods.weight_change import WeightChange

_METHODS: tuple[type[Method], ...] = (GuidanceLoss, PriorPrediction, MaskPrior, Preservation, Slider, WeightChange)


def other_texts(data: Sequence[Sample] | EncodedDataset, config: ResolvedConfig) -> OtherTexts | None:
    """The further texts of samples that the methods of a run need; None for none. Raises OptionError."""
    return OtherTexts.of(data, {method.name: method.texts for method in methods_of(config)})


def methods_of(config: ResolvedConfig) -> tuple[Method, ...]:
    """Those that the settings turn on."""
    return tuple(method for kind in _METHODS if (method := kind.of(config)) is not None)
