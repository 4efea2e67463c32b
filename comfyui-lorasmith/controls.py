"""ControlNets of conditionings: what they add to a frozen network, as ComfyUI's samplers have it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.tensor_digests import digest_of_tensors

from .samplings import Sampling


class Control:
    """The ControlNet of one image, with those that it comes after.

    ComfyUI evaluates one at one noise level, so images with them are evaluated one by one.
    """

    def __init__(self, control: Any) -> None:
        self._control = control
        self._hints: list[Tensor | None] = []  # of each in `_chain`, of the size and kind that the network takes

    @property
    def models(self) -> list[Any]:
        """The patchers of their networks."""
        return list(self._control.get_models())

    @property
    def digest(self) -> str:
        """Of hints and settings."""
        return digest_of_tensors(
            (f"{type(one).__name__} {one.strength} {one.timestep_percent_range}", one.cond_hint_original)
            for one in self._chain()
        )

    def prepare(self, base: Any, latents: Tensor, arguments: Mapping[str, Any]) -> None:
        """Compute the hints for latents of this shape, which may load a VAE, and keep them in host memory."""
        with self._running(base):
            for one in self._chain():
                one.timestep_range = None
            sigma = torch.full((1,), float(base.model_sampling.percent_to_sigma(0.5)), device=latents.device)
            self._control.get_control(latents, sigma, arguments, 1, {})
            hints = [getattr(one, "cond_hint", None) for one in self._chain()]
            self._hints = [None if hint is None else hint.to("cpu", copy=True) for hint in hints]

    def at(self, base: Any, state: Tensor, sigma: Tensor, arguments: Mapping[str, Any]) -> Any:
        """What `apply_model` takes as `control`, for a sampler's state (1, ...) at its sigma (1,)."""
        with self._running(base):
            for one, hint in zip(self._chain(), self._hints, strict=True):
                one.cond_hint = None if hint is None else hint.to(state.device)
            transformer = arguments["transformer_options"]
            return self._control.get_control(state, sigma, arguments, 1, transformer)

    @contextlib.contextmanager
    def _running(self, base: Any) -> Iterator[None]:
        try:
            self._control.pre_run(base, base.model_sampling.percent_to_sigma)
            yield
        finally:
            self._control.cleanup()
            for one in self._chain():
                if hasattr(one, "control_input"):  # what a T2I adapter keeps of one hint
                    one.control_input = None

    def _chain(self) -> Iterator[Any]:
        one = self._control
        while one is not None:
            yield one
            one = one.previous_controlnet


class ControlOfState:
    """A `Control` in a conditioning: asked at noised latents of training, it is evaluated at a sampler's state."""

    def __init__(self, control: Control, base: Any, sampling: Sampling) -> None:
        self._control, self._base, self._sampling = control, base, sampling

    def get_control(self, noised: Tensor, sigma: Tensor, arguments: Mapping[str, Any], count: int, options: Any) -> Any:
        in_training = self._base.__dict__.pop("model_sampling")  # a ControlNet has the sampler's own
        try:
            return self._control.at(self._base, self._sampling.state(noised, sigma), sigma, arguments)
        finally:
            self._base.__dict__["model_sampling"] = in_training
