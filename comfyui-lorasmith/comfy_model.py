"""`ComfyModel`: a MODEL of ComfyUI as what Lorasmith trains on.

The network stays where ComfyUI has it and computes as ComfyUI samples it: with its casts, patches, wrappers, LoRAs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management as management
import comfy.sample
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
from lorasmith.families.base import Conditioning
from lorasmith.training.config import ResolvedConfig
from lorasmith.training.runtime import Runtime
from lorasmith.training.trainable import Trainable, evaluating

from .conditionings import ComfyConditioning, ConditioningMaker, joined, options_of
from .controls import Control
from .gradients import kernels_with_gradients, sums_out_of_place
from .layer_weights import casts_on_use, inference_tensors_opened, norms_resident
from .samplings import RawSampling, sampling_of

PREFIX = "diffusion_model"


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
        self.names = replace(self.names, portable="comfy")
        self.facts = replace(self.facts, family_title=title)
        self._predicts = False  # whether it has
        self._controls: list[Control] = []  # of its samples
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
        before = management.in_training
        with torch.inference_mode(False):
            # What does not fit stays in host memory, as in sampling; with `offloading` all of it does.
            others = [model for control in self._controls for model in control.models]
            management.load_models_gpu([patcher, *others], memory_required=1e20 if offloading else 0)
            try:
                management.in_training = True
                patcher.pre_run()
                with inference_tensors_opened(patcher.model):
                    yield
            finally:
                management.in_training = before
                patcher.cleanup()
                if patcher is not self.patcher:
                    management.load_models_gpu([self.patcher])

    @contextlib.contextmanager
    def frozen(self, config: ResolvedConfig, runtime: Runtime) -> Iterator[None]:
        for name, is_on in {
            "quantization": config.quantization != "none",
            "sharding": runtime.sharding,
            "compile": runtime.compile,
            "cuda_graphs": runtime.cuda_graphs,
        }.items():
            if is_on:
                raise OptionError(
                    f"{name} does not apply to a MODEL, whose weights ComfyUI holds; choose it when it is loaded"
                )
        with contextlib.ExitStack() as stack:
            stack.enter_context(reproducible(config.deterministic, runtime.device))
            stack.enter_context(self.loaded(runtime.dtype, offloading=runtime.offloading))
            stack.enter_context(evaluating(self.module))
            stack.enter_context(kernels_with_gradients())
            stack.enter_context(sums_out_of_place())
            stack.enter_context(norms_resident(self.module, runtime.device))
            stack.enter_context(casts_on_use(self.module, runtime.device, runtime.dtype))
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
            except (RuntimeError, TypeError, ValueError, KeyError) as error:
                if self._predicts or is_out_of_memory(error):
                    raise
                raise DataError(
                    f"latents and conditionings must be ones of {self.title}, whose network fails on these "
                    f"({first_line(error)}); make them with this model's VAE and text encoder"
                ) from error
            self._predicts = True
            return found

    def _applied(self, latents: Tensor, time: Tensor, conditioning: ComfyConditioning) -> Tensor:
        base, options = self.patcher.model, self.patcher.model_options
        sigma = self.sampling.sigma(time)
        transformer = {**options.get("transformer_options", {}), "cond_or_uncond": [0], "sigmas": sigma}
        arguments = {**conditioning.arguments(), "transformer_options": transformer}
        if (control := arguments.pop("control", None)) is not None:
            arguments["control"] = control.at(base, self.sampling.state(latents.float(), sigma), sigma, arguments)
        # Beside the submodule of that name, which it hides.
        base.__dict__["model_sampling"] = RawSampling(self.sampling, time)
        try:
            wrapper = options.get("model_function_wrapper")
            if wrapper is None:
                found: Tensor = base.apply_model(latents, sigma, **arguments)
            else:
                given = {"input": latents, "timestep": sigma, "c": arguments, "cond_or_uncond": [0]}
                found = wrapper(base.apply_model, given)
        finally:
            del base.__dict__["model_sampling"]
        return found

    def join(self, conditionings: Sequence[Conditioning]) -> Conditioning:
        return joined([one for one in conditionings if isinstance(one, ComfyConditioning)])

    def identity(self) -> Mapping[str, str]:
        backup = {key: kept.weight for key, kept in self.patcher.backup.items()}
        originals = {key.removeprefix(f"{PREFIX}."): weight for key, weight in backup.items()}
        found = {"denoiser": weights_digest(self.module, originals)}
        if self.patcher.patches:
            found["patches"] = digest_of_tensors(_patch_tensors(self.patcher.patches))
        return found

    def check(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if not isinstance(sample.conditioning, ComfyConditioning):
                raise DataError(f"{sample.name} must have a conditioning of ComfyUI; make samples with samples_of")

    def samples(self, latents: Sequence[Tensor], positive: Sequence[Sequence[Any]]) -> list[Sample]:
        """Samples of latents (1, channels, [frames,] height, width) as VAEs encode them, each with its conditioning.

        Raises DataError for latents or conditionings that do not fit the MODEL.
        """
        made, base = ConditioningMaker(), self.patcher.model
        names = [f"image {number}" for number in range(1, len(positive) + 1)]
        given = [options_of(caption, name) for caption, name in zip(positive, names, strict=True)]
        controls = [Control(options["control"]) if options.get("control") else None for options in given]
        self._controls += filter(None, controls)
        found = []
        with self.loaded(self.dtype), torch.no_grad():
            for image, options, control, name in zip(latents, given, controls, names, strict=True):
                image = comfy.sample.fix_empty_latent_channels(self.patcher, image.detach().clone())
                channels = base.latent_format.latent_channels
                if image.shape[1] != channels:
                    raise DataError(
                        f"latents for {self.title} must have {channels} channels, got {image.shape[1]} for {name}; "
                        "encode the pictures with the VAE of this model"
                    )
                clean = base.process_latent_in(image.float())
                options |= {"device": self.device, "noise": clean.to(self.device), "prompt_type": "positive"}
                options |= {"latent_image": options["noise"], "denoise_mask": None, "seed": 0}
                options.setdefault("width", clean.shape[-1] * 8)
                options.setdefault("height", clean.shape[-2] * 8)
                conds = {**options["model_conds"], **base.extra_conds(**options)}
                conds = {
                    key: cond.process_cond(batch_size=1, area=None, device=self.device) for key, cond in conds.items()
                }
                if control is not None:
                    control.prepare(base, options["noise"], {key: cond.cond for key, cond in conds.items()})
                found.append(Sample(clean[0] / self.sampling.scale, made(conds, control), name))
        return found


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
