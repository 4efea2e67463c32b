"""`ComfyModel`: a MODEL of ComfyUI as what Lorasmith trains on.

The network stays where ComfyUI has it and computes as ComfyUI samples it: with its casts, patches, wrappers, LoRAs.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from lorasmith.adapters.frozen_layer import weights_digest
from lorasmith.adapters.patch import patches_applied
from lorasmith.core.allocator import is_out_of_memory
from lorasmith.core.errors import DataError, ModelError, OptionError
from lorasmith.core.placement import reproducible
from lorasmith.core.printable import first_line
from lorasmith.core.tensor_digests import digest_of_tensors
from lorasmith.data.dataset import Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.trainable import Trainable, evaluating
from lorasmith.training.way import Way

from .bypassed import bypassed_adapters, bypassed_in_weights
from .conditionings import ComfyConditioning, ConditioningMaker, joined, options_of
from .controls import Control, ControlOfState
from .gradients import experts_with_gradients, kernels_with_gradients, prompts_computed_anew
from .layer_weights import casts_on_use, inference_tensors_opened, norms_resident
from .samplings import RawSampling, sampling_of

PREFIX = "diffusion_model"

_log = logging.getLogger("lorasmith")


class ComfyModel(Trainable):
    """A MODEL. Its patches are part of what is frozen, and are left on it.

    Raises:
        ModelError: it is no MODEL of a diffusion network, or is not in memory.
        OptionError: its sampling is of a kind that training does not cover.
    """

    def __init__(self, model: Any) -> None:
        base = getattr(model, "model", None)
        module = getattr(base, PREFIX, None)
        if not isinstance(module, torch.nn.Module):
            raise ModelError(f"a MODEL of ComfyUI must have a network to train on, got {type(model).__name__}")
        if any(tensor.is_meta for tensor in module.parameters()):
            raise ModelError(
                f"the weights of a MODEL must be in memory, but {type(base).__name__} has some on torch's meta device; "
                "load it with a loader that reads them"
            )
        is_dynamic = getattr(model, "is_dynamic", lambda: False)
        self.patcher = _copied(model) if is_dynamic() else model
        base = self.patcher.model
        title = base.model_config.__class__.__name__
        self.sampling = sampling_of(self.patcher.get_model_object("model_sampling"))
        super().__init__(base.diffusion_model, diffusion=self.sampling.diffusion, title=title)
        # Of those that take one, a batch has one.
        self._takes_next_level = getattr(self.module, "time_r_in", None) is not None
        self._is_sound = base.latent_format.latent_dimensions == 1
        self.names = replace(self.names, portable="comfy")
        self.facts = replace(self.facts, family_title=title)
        self._predicts = False  # whether it has
        self._controls: list[Control] = []  # of its samples
        self._options: Mapping[str, Any] = {}  # of a MODEL, as prepared for sampling; while it is loaded
        self._is_eager = False  # whether it was told that compiled code is left out
        self._uuid = uuid.uuid4()  # of all conditionings, for wrappers that keep something for each
        self.interrupted = False  # whether ComfyUI asked to stop while the network was evaluated

    @property
    def device(self) -> torch.device:
        """Where ComfyUI computes with it."""
        device: torch.device = self.patcher.load_device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """In which ComfyUI computes with it."""
        manual = self.patcher.get_model_object("manual_cast_dtype")
        dtype: torch.dtype = manual or self.patcher.model.get_dtype()
        return dtype

    @contextlib.contextmanager
    def loaded(self, dtype: torch.dtype, *, offloading: bool = False) -> Iterator[None]:
        """Inside the context, ComfyUI has the network loaded, computing in `dtype`, outside of inference mode."""
        patcher = self.patcher
        if dtype != self.dtype:
            patcher = patcher.clone()
            patcher.set_model_compute_dtype(dtype)
        before, options_before = management.in_training, self._options
        with torch.inference_mode(False):
            options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
            comfy.sampler_helpers.prepare_model_patcher(patcher, {}, options)
            wrappers = options["transformer_options"]["wrappers"].get("apply_model", {})
            if wrappers.pop("torch.compile", None) and not self._is_eager:
                self._is_eager = True
                _log.warning("The MODEL is compiled (torch.compile), which is left out while it trains.")
            # What does not fit stays in host memory, as in sampling; with `offloading` all of it does.
            others = [model for control in self._controls for model in control.models]
            others += patcher.get_nested_additional_models()
            management.load_models_gpu([patcher, *others], memory_required=1e20 if offloading else 0)
            try:
                management.in_training, self._options = True, options
                comfy.samplers.cast_to_load_options(options, device=self.device, dtype=patcher.model_dtype())
                patcher.pre_run()
                with inference_tensors_opened(patcher.model), bypassed_in_weights(self.module, PREFIX):
                    yield
            finally:
                management.in_training, self._options = before, options_before
                patcher.cleanup()
                comfy.samplers.cast_to_load_options(options, device=patcher.offload_device)
                if patcher is not self.patcher:
                    management.load_models_gpu([self.patcher])

    @contextlib.contextmanager
    def frozen(self, config: ResolvedConfig, way: Way) -> Iterator[None]:
        for name, is_on in {
            "quantization": config.quantization != "none",
            "sharding": way.sharding,
            "compile": way.compile,
            "cuda_graphs": way.cuda_graphs,
        }.items():
            if is_on:
                raise OptionError(
                    f"{name} does not apply to a MODEL, whose weights ComfyUI holds; choose it when it is loaded"
                )
        with contextlib.ExitStack() as stack:
            stack.enter_context(reproducible(config.deterministic, way.device))
            stack.enter_context(self.loaded(way.dtype, offloading=way.offloading))
            stack.enter_context(evaluating(self.module))
            stack.enter_context(experts_with_gradients(self.module))
            stack.enter_context(kernels_with_gradients())
            stack.enter_context(norms_resident(self.module, way.device))
            stack.enter_context(casts_on_use(self.module, way.device, way.dtype))
            # Of a LoRA that is continued, and below what is trained.
            below = [replace(patch, bypass=True) for patch in self.patches]
            stack.enter_context(patches_applied(self.module, below))
            yield

    def predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning, ComfyConditioning)
        while True:
            try:
                found = self._applied(latents, time, conditioning)
            except management.InterruptProcessingException:  # which was asked for once: the step is finished first
                self.interrupted = True
                continue
            except _OF_NETWORKS as error:
                if self._predicts or is_out_of_memory(error):
                    raise
                raise self._not_of_it(error) from error
            self._predicts = True
            return found

    def _not_of_it(self, error: Exception) -> DataError:
        fails = f"needs {error} of them" if isinstance(error, KeyError) else f"fails on these ({first_line(error)})"
        return DataError(
            f"latents and conditionings must be ones of {self.title}, whose network {fails}; make them with this "
            "model's VAE and text encoder"
        )

    def _applied(self, latents: Tensor, time: Tensor, conditioning: ComfyConditioning) -> Tensor:
        """The network as ComfyUI's samplers evaluate it, with all that nodes have put around it."""
        base, sampling = self.patcher.model, self.sampling
        sigma, options = sampling.sigma(time), dict(self._options)
        # Networks of average velocities take the level that a step leads to: for the flow itself, that which it is at.
        transformer = {**options["transformer_options"], "sample_sigmas": sigma[:1].expand(2)}
        options["transformer_options"] = transformer
        conds, control = conditioning.conds_of_batch()
        given: dict[str, Any] = {"model_conds": conds, "uuid": self._uuid}
        if control is not None:
            given["control"] = ControlOfState(control, base, sampling)
        noised = latents.float() if latents.ndim != 4 or not self._is_sound else latents.float().squeeze(2)
        # Beside the submodule of that name, which it hides.
        base.__dict__["model_sampling"] = RawSampling(sampling, time)
        try:
            found: Tensor
            with prompts_computed_anew(self.module):
                (found,) = comfy.samplers.calc_cond_batch(base, [[given]], noised, sigma, options)
        finally:
            del base.__dict__["model_sampling"]
        return found.view(latents.shape)

    def join(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        return joined([one for one in conditionings if isinstance(one, ComfyConditioning)])

    def identity(self) -> Mapping[str, str]:
        backup = {key: kept.weight for key, kept in self.patcher.backup.items()}
        originals = {key.removeprefix(f"{PREFIX}."): weight for key, weight in backup.items()}
        found = {"denoiser": weights_digest(self.module, originals)}
        if self.patcher.patches:
            found["patches"] = digest_of_tensors(_patch_tensors(self.patcher.patches))
        if bypassed := bypassed_adapters(self.patcher, PREFIX):
            found["bypassed"] = digest_of_tensors(_tensors(bypassed, ""))
        return found

    def check(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if not isinstance(sample.conditioning, ComfyConditioning):
                raise DataError(f"{sample.name} must have a conditioning of ComfyUI; make samples with samples_of")

    def samples(
        self,
        latents: Sequence[Tensor],
        positive: Sequence[Sequence[Any]],
        masks: Sequence[Tensor | None] | None = None,
    ) -> list[Sample]:
        """Samples of latents (1, channels, [frames,] height, width) as VAEs encode them, each with its conditioning.

        Those of sound are (1, channels, length). A mask, as a `noise_mask`, weighs the loss of its latents by place.

        Raises DataError for latents or conditionings that do not fit the MODEL.
        """
        made, base = ConditioningMaker(), self.patcher.model
        names = [f"image {number}" for number in range(1, len(positive) + 1)]
        given = [options_of(caption, name) for caption, name in zip(positive, names, strict=True)]
        controls = [Control(options["control"]) if options.get("control") else None for options in given]
        self._controls += filter(None, controls)
        found = []
        with self.loaded(self.dtype), torch.no_grad():
            for image, options, control, mask, name in zip(
                latents, given, controls, masks or [None] * len(names), names, strict=True
            ):
                clean, mask = self._clean(image, mask, name)
                noise = clean.to(self.device)
                try:
                    conds = self._conds(options, noise, mask)
                except _OF_NETWORKS as error:
                    if is_out_of_memory(error):
                        raise
                    raise self._not_of_it(error) from error
                if "num_video_frames" in conds:
                    raise DataError(
                        f"latents of {self.title} are the frames of one video as a batch, which cannot be trained on; "
                        "use a video model whose latents have frames, such as Wan"
                    )
                if control is not None:
                    control.prepare(base, noise, {key: cond.cond for key, cond in conds.items()})
                places = None if mask is None else mask[0].amax(dim=tuple(range(mask.ndim - 3))).cpu()
                whole = (clean.unsqueeze(2) if self._is_sound else clean)[0]
                found.append(
                    Sample(
                        whole / self.sampling.scale,
                        made(conds, control, alone=self._takes_next_level),
                        name,
                        places=places,
                    )
                )
        return found

    def _clean(self, image: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
        """Latents as the network has them, fp32, and a mask of their shape. Raises DataError."""
        base = self.patcher.model
        image = comfy.sample.fix_empty_latent_channels(self.patcher, image.detach().clone())
        channels = base.latent_format.latent_channels
        if image.shape[1] != channels:
            raise DataError(
                f"latents for {self.title} must have {channels} channels, got {image.shape[1]} for {name}; "
                "encode the pictures with the VAE of this model"
            )
        if not image.any():
            raise DataError(
                f"latents to train on must be of pictures, but those of {name} are all zero, as empty ones are; encode "
                "pictures with the VAE of this model"
            )
        if self._is_sound and image.ndim != 3:
            raise DataError(
                f"latents for {self.title} must be (batch, channels, length), got {tuple(image.shape)} for {name}; "
                "encode the sounds with the VAE of this model"
            )
        clean: Tensor = base.process_latent_in(image.float())
        if mask is None:
            return clean, None
        mask = comfy.sampler_helpers.prepare_mask(mask.detach().clone(), clean.shape, self.device)
        if not mask.any():
            raise DataError(
                f"the noise_mask of {name} must leave a part to train on, and is zero everywhere; leave it out"
            )
        return clean, mask

    def _conds(self, options: Mapping[str, Any], noise: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """ComfyUI's COND objects of a conditioning, by argument."""
        base, shapes = self.patcher.model, [tuple(noise.shape)]
        others = {"latent_image": noise, "denoise_mask": mask, "seed": 0, "latent_shapes": shapes}
        encode = comfy.samplers.encode_model_conds
        (encoded,) = encode(base.extra_conds, [dict(options)], noise, self.device, "positive", **others)
        conds = encoded["model_conds"]
        return {key: cond.process_cond(batch_size=1, area=None, device=self.device) for key, cond in conds.items()}


_OF_NETWORKS = (RuntimeError, TypeError, ValueError, KeyError)
"""What networks raise for inputs that are not theirs."""


def _copied(model: Any) -> Any:
    """ComfyUI's copy of a MODEL that it loads dynamically, which ends with its user."""
    if not hasattr(model, "get_non_dynamic_delegate"):
        raise ModelError(
            "a MODEL that ComfyUI loads dynamically must be one that it can copy, which this version of ComfyUI does "
            "not; update it, or start it without dynamic VRAM"
        )
    kept = model.non_dynamic_delegate_model
    try:
        return model.get_non_dynamic_delegate()
    finally:
        model.non_dynamic_delegate_model = kept


def _patch_tensors(patches: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a MODEL's patches, with what else they hold in their names."""
    for key, entries in sorted(patches.items()):
        for number, entry in enumerate(entries):
            yield from _tensors(entry, f"{key} {number}")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _tensors(value[key], f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _tensors(part, f"{name}.{index}")
    elif isinstance(value, bool | int | float | str) or value is None:
        yield f"{name} {value!r}", torch.empty(0)
    elif hasattr(value, "weights"):  # a weight adapter
        yield from _tensors(value.weights, f"{name}.{type(value).__name__}")
    else:  # a function, such as one that takes a part of a weight
        yield f"{name} {getattr(value, '__qualname__', type(value).__qualname__)}", torch.empty(0)
