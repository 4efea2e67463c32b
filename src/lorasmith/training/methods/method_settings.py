"""The methods of training: their settings, in the order of the help, and their classes, in that of a step."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.training.methods.guidance_settings import GuidanceSettings
from lorasmith.training.methods.own_method_settings import OwnMethodSettings
from lorasmith.training.methods.pair_settings import PairSettings
from lorasmith.training.methods.preservation_settings import PreservationSettings
from lorasmith.training.methods.slider_settings import SliderSettings
from lorasmith.training.token_route_settings import TokenRouteSettings


@dataclass(frozen=True, kw_only=True)
class MethodSettings(  # a dataclass has the fields of its last base first
    OwnMethodSettings, SliderSettings, PairSettings, TokenRouteSettings, GuidanceSettings, PreservationSettings
):
    """What a step does besides comparing one prediction with its target; see `training.methods.method`."""


METHODS = (
    "guidance_loss.GuidanceLoss",
    "prior_prediction.PriorPrediction",
    "mask_prior.MaskPrior",
    "preservation.Preservation",
    "slider.Slider",
    "slider.PairSlider",
    "preference.Preference",
    "weight_change.WeightChange",
)
"""File and class of each `Method`, in the order in which a step asks them. They are imported where torch is."""
