"""Pictures while a LoRA is trained, drawn by ComfyUI's sampler from the LoRA's file as ComfyUI loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.core.options import options_of
from lorasmith.report.pictures import Clip, PictureOrClip
from lorasmith.runs.preview_budget import PreviewProgram
from lorasmith.runs.run_previews import RunPreviews
from lorasmith.sampling.generate import Sampling
from lorasmith.sampling.previews import parse_strengths
from lorasmith.sampling.sample import SamplingCancelledError
from lorasmith.training.config import TrainConfig
from lorasmith.training.train import Plan, RunHost
from lorasmith.training.watchers import preview_steps
from lorasmith.workflow import Input

from .comfy_model import ComfyModel
from .inputs import CATEGORY, widget

PREVIEWS_TYPE = "LORASMITH_PREVIEWS"

_RATE = 16.0  # frames per second of clips
_OPTIONS = options_of(TrainConfig)
_CFG = "Classifier-free guidance; 1 for models that are distilled to need none."
_SAMPLING = ("seed", "steps", "cfg", "sampler_name", "scheduler")


@dataclass(frozen=True, kw_only=True)
class Previews:
    """What the node says: inputs of a sampler, and when to draw."""

    vae: Any
    positive: Sequence[Any]  # a CONDITIONING for each picture
    negative: Any
    latent: Mapping[str, Any]
    sampling: Mapping[str, Any]  # by names of KSampler's inputs
    every: int | None
    strengths: tuple[float, ...]


class PreviewsNode:
    """What to draw during a training."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Pictures that Train LoRA (Lorasmith) draws while it trains, without and with the LoRA so far, always from the "
        "same noise. They are shown on that node and kept in the run's folder."
    )
    RETURN_TYPES = (PREVIEWS_TYPE,)
    RETURN_NAMES = ("previews",)
    OUTPUT_TOOLTIPS = ("For previews of Train LoRA or Resume LoRA Training.",)
    FUNCTION = "previews"
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        every = Input.from_option(
            _OPTIONS["preview_every"],
            default=0,
            min=0,
            tooltip="Steps of training between pictures; 0 is after 30, a twentieth, a quarter, a half and three "
            "quarters of the run. The model without the LoRA is drawn before the first step, and the finished LoRA "
            "always.",
        )
        samplers = comfy.samplers.KSampler
        return {
            "required": {
                "vae": ("VAE", {"tooltip": "Decodes the pictures."}),
                "positive": ("CONDITIONING", {"tooltip": "A prompt, or a list of prompts with a picture for each."}),
                "negative": ("CONDITIONING", {"tooltip": "What the pictures shall not show; an empty prompt will do."}),
                "latent": ("LATENT", {"tooltip": "An empty latent of the pictures' size."}),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2**64 - 1,
                        "control_after_generate": "fixed",
                        "tooltip": "Of the noise, which is the same in all pictures of a prompt.",
                    },
                ),
                "steps": widget(Input.from_option(_OPTIONS["preview_steps"], default=Sampling.steps)),
                "cfg": (
                    "FLOAT",
                    {"default": 4.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01, "tooltip": _CFG},
                ),
                "sampler_name": (samplers.SAMPLERS, {"tooltip": "As of KSampler."}),
                "scheduler": (samplers.SCHEDULERS, {"tooltip": "As of KSampler."}),
                "every": widget(every),
                "strengths": widget(Input.from_option(_OPTIONS["preview_strengths"], default="0.5,1")),
            }
        }

    def previews(self, **values: Sequence[Any]) -> tuple[Previews]:
        given = {name: value[0] for name, value in values.items()}
        return (
            Previews(
                vae=given["vae"],
                positive=values["positive"],
                negative=given["negative"],
                latent=given["latent"],
                sampling={name: given[name] for name in _SAMPLING},
                every=given["every"] or None,
                strengths=parse_strengths(given["strengths"]),
            ),
        )


class Drawing:
    """Draws the pictures of a node; those without a LoRA once."""

    def __init__(self, model: ComfyModel, previews: Previews) -> None:
        self._model, self._previews = model, previews
        self._base: list[PictureOrClip] | None = None

    def __call__(self, lora: Path | None, strength: float = 1.0) -> list[PictureOrClip]:
        """Raises SamplingCancelledError if ComfyUI's ✕ was pressed, before or meanwhile."""
        if self._model.interrupted:
            raise SamplingCancelledError
        if lora is None:
            if self._base is None:
                self._base = self._drawn(self._model.patcher)
            return self._base
        tensors = comfy.utils.load_torch_file(str(lora), safe_load=True)
        patcher, _ = comfy.sd.load_lora_for_models(self._model.patcher, None, tensors, strength, 0.0)
        return self._drawn(patcher)

    def _drawn(self, patcher: Any) -> list[PictureOrClip]:
        try:
            with torch.no_grad():
                return [self._picture(patcher, positive) for positive in self._previews.positive]
        except management.InterruptProcessingException as error:
            self._model.interrupted = True
            raise SamplingCancelledError from error

    def _picture(self, patcher: Any, positive: Any) -> PictureOrClip:
        previews = self._previews
        sampling, latent = previews.sampling, previews.latent["samples"][:1]
        # An empty latent says for which scale of pictures it is made, so that it is resized for models of another.
        ratios = {name: value for name, value in previews.latent.items() if name.startswith("downscale_ratio")}
        latent = comfy.sample.fix_empty_latent_channels(patcher, latent.detach().clone(), **ratios)
        found = comfy.sample.sample(
            patcher,
            comfy.sample.prepare_noise(latent, sampling["seed"]),
            sampling["steps"],
            sampling["cfg"],
            sampling["sampler_name"],
            sampling["scheduler"],
            positive,
            previews.negative,
            latent,
            seed=sampling["seed"],
            disable_pbar=True,
        )
        frames = tuple(_image(one) for one in previews.vae.decode(found).flatten(0, -4))
        return frames[0] if len(frames) == 1 else Clip(frames, _RATE)


def _image(pixels: Tensor) -> Image.Image:
    """A picture of pixels (height, width, 3) in [0, 1]."""
    return Image.fromarray(pixels.float().cpu().mul(255).round().clamp(0, 255).to(torch.uint8).numpy())


def run_previews(model: ComfyModel, previews: Previews, plan: Plan, folder: Path, host: RunHost) -> RunPreviews:
    """The previews of a run."""
    sampling, prompts = previews.sampling, tuple(f"prompt {number}" for number, _ in enumerate(previews.positive, 1))
    if not prompts:
        raise DataError("previews need a prompt, got an empty list; link a CONDITIONING to positive")
    made_with = {
        "Steps": sampling["steps"],
        "Sampler": f"{sampling['sampler_name']} {sampling['scheduler']}",
        "CFG scale": sampling["cfg"],
        "Seed": sampling["seed"],
        "Model": model.title,
    }
    program = PreviewProgram(sampling["steps"], previews.strengths, preview_steps(plan.job.config), prompts=prompts)
    return RunPreviews(Drawing(model, previews), plan, program, folder, host, made_with)
