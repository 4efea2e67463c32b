"""Nodes that replace a model's noise schedule, which training and sampling both follow."""

from __future__ import annotations

from dataclasses import replace

from lorasmith.core.errors import ModelError, OptionError
from lorasmith.diffusion.schedule import EXPONENTIAL_STEPS, DiscreteSchedule, FlowSchedule, ResolutionShift
from lorasmith.families.base import Diffusion
from lorasmith.families.model import Denoiser
from lorasmith.workflow import Input, NodeContext, Output, node

_STEPS = 1000  # timesteps of networks with discrete ones
_PREDICTIONS = {"eps": "epsilon", "v_prediction": "v", "lcm": "epsilon"}
_DISTILLED_STEPS = 50  # timesteps of latent consistency models


def _shift(default: float) -> Input:
    tooltip = "Larger values spend more steps, and more of training, on noisy latents; 1 is none."
    return Input("shift", "FLOAT", default=default, min=0.0, max=100.0, step=0.01, tooltip=tooltip)


def _side(name: str) -> Input:
    return Input(name, "INT", default=1024, min=16, max=16384, step=8, tooltip="Of the picture in pixels.")


@node(
    "ModelSamplingSD3",
    display_name="ModelSamplingSD3",
    category="model/patch/stable diffusion",
    inputs=[Input("model", "MODEL"), _shift(3.0)],
    outputs=[Output("MODEL")],
)
def model_sampling_sd3(context: NodeContext, *, model: Denoiser, shift: float) -> tuple[Denoiser]:
    """Train and sample as a flow with a shift. In ComfyUI it is for networks whose time goes to 1000."""
    _check_time(context, model, "ModelSamplingSD3", "ModelSamplingAuraFlow", time_scale=_STEPS)
    return (_as_flow(model, shift),)


@node(
    "ModelSamplingAuraFlow",
    display_name="ModelSamplingAuraFlow",
    category="model/patch",
    inputs=[Input("model", "MODEL"), _shift(1.73)],
    outputs=[Output("MODEL")],
)
def model_sampling_aura_flow(context: NodeContext, *, model: Denoiser, shift: float) -> tuple[Denoiser]:
    """Train and sample as a flow with a shift. In ComfyUI it is for networks whose time goes to 1."""
    _check_time(context, model, "ModelSamplingAuraFlow", "ModelSamplingSD3", time_scale=1)
    return (_as_flow(model, shift),)


@node(
    "ModelSamplingFlux",
    display_name="ModelSamplingFlux",
    category="model/patch/flux",
    inputs=[
        Input("model", "MODEL"),
        Input("max_shift", "FLOAT", default=1.15, min=0.0, max=100.0, step=0.01, tooltip="Exponent of 1024×1024 px."),
        Input("base_shift", "FLOAT", default=0.5, min=0.0, max=100.0, step=0.01, tooltip="Exponent of 256×256 px."),
        _side("width"),
        _side("height"),
    ],
    outputs=[Output("MODEL")],
)
def model_sampling_flux(
    context: NodeContext, *, model: Denoiser, max_shift: float, base_shift: float, width: int, height: int
) -> tuple[Denoiser]:
    """Train and sample as a flow with the shift of a picture's size."""
    _check_time(context, model, "ModelSamplingFlux", "ModelSamplingSD3", time_scale=1)
    by_size = ResolutionShift(mu=(base_shift, max_shift))
    shift = by_size.of_patches(width * height / 16**2)
    return (_as_flow(model, shift, table=EXPONENTIAL_STEPS, resolution_shift=by_size),)


@node(
    "ModelSamplingDiscrete",
    display_name="ModelSamplingDiscrete",
    category="model/patch",
    inputs=[
        Input("model", "MODEL"),
        Input(
            "sampling",
            "COMBO",
            options=("eps", "v_prediction", "lcm", "x0", "img_to_img", "img_to_img_flow"),
            tooltip="What the network predicts; lcm is eps at 50 of the 1000 timesteps.",
        ),
        Input("zsnr", "BOOLEAN", default=False, tooltip="Rescale the schedule to end in pure noise."),
    ],
    outputs=[Output("MODEL")],
)
def model_sampling_discrete(context: NodeContext, *, model: Denoiser, sampling: str, zsnr: bool) -> tuple[Denoiser]:
    """Train and sample with another kind of prediction, or with zero terminal SNR."""
    schedule = model.base.components.schedule
    if sampling not in _PREDICTIONS:
        raise OptionError(
            f"sampling must be one of {', '.join(_PREDICTIONS)} here, got {sampling!r}; choose one of these"
        )
    if not isinstance(schedule, DiscreteSchedule):
        raise ModelError(
            f"ModelSamplingDiscrete is for models with discrete timesteps, but {model.base.title} is a flow; "
            "remove the node, or use ModelSamplingAuraFlow"
        )
    if zsnr:
        schedule = schedule.zero_terminal()
    if sampling == "lcm":
        schedule = schedule.every(len(schedule.sigmas) // _DISTILLED_STEPS)
    return (replace(model, noising=Diffusion(_PREDICTIONS[sampling], schedule)),)


def _time_scale(model: Denoiser) -> float:
    """The network's unit of time: its number of discrete steps, or the scale of its own flow."""
    own = model.base.components.schedule
    return own.time_scale if isinstance(own, FlowSchedule) else float(_STEPS)


def _check_time(context: NodeContext, model: Denoiser, name: str, other: str, *, time_scale: float) -> None:
    """Warn if ComfyUI's node `name` would pass the network a time of another scale, and name `other` instead."""
    if (needed := _time_scale(model)) != time_scale:
        context.warn(
            f"{name} counts time up to {time_scale:g} in ComfyUI, but the network of {model.base.title} up to "
            f"{needed:g}, so that its pictures there are noise; here only the shift is taken; use {other} instead"
        )


def _as_flow(
    model: Denoiser, shift: float, *, table: int = _STEPS, resolution_shift: ResolutionShift | None = None
) -> Denoiser:
    """The model as a flow in the network's own unit of time, `table` sigmas long. OptionError for a shift of 0."""
    if shift <= 0:
        raise OptionError(f"shift must be greater than 0, got {shift:g}; 1 is none")
    by_size = resolution_shift or model.base.components.schedule.resolution_shift
    schedule = FlowSchedule(shift, table, by_size, _time_scale(model))
    return replace(model, noising=Diffusion("flow", schedule))
