"""A stand-in for what the pack uses of ComfyUI, for tests; `prove.py --stand-in` holds it against a checkout.

It has the interfaces alone: a MODEL is kept on the CPU, and its network is a small transformer that adds in place.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WIDTH, CHANNELS, CONTEXT = 32, 4, 16
VERSION = "0.33.0"

in_training = False
opened = 0
"""Casts that were not given back."""

_state = {"interrupted": False}


class InterruptProcessingException(BaseException):
    pass


def interrupt_current_processing(value: bool = True) -> None:
    _state["interrupted"] = value


def processing_interrupted() -> bool:
    return _state["interrupted"]


def throw_exception_if_processing_interrupted() -> None:
    if _state["interrupted"]:
        _state["interrupted"] = False
        raise InterruptProcessingException


def cast_to(weight: Tensor, dtype: Any = None, device: Any = None) -> Tensor:
    return weight.to(device=device, dtype=dtype)


def load_models_gpu(models: Sequence[Any], memory_required: float = 0) -> None:
    for patcher in models:
        patcher.load()


class CastWeightBiasOp:
    comfy_cast_weights = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    def _used(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        throw_exception_if_processing_interrupted()
        if not (self.comfy_cast_weights or self.weight_function or self.bias_function):
            return self.weight, self.bias  # type: ignore[attr-defined]
        weight, bias, stream = cast_bias_weight(self, x, offloadable=True)
        uncast_bias_weight(self, weight, bias, stream)
        return weight, bias


def cast_bias_weight(
    s: Any, input: Any = None, dtype: Any = None, device: Any = None, bias_dtype: Any = None, offloadable: bool = False
) -> Any:
    global opened
    opened += 1
    dtype = input.dtype if dtype is None else dtype
    weight = s.weight.to(dtype)
    for function in s.weight_function:
        weight = function(weight)
    bias = None if s.bias is None else s.bias.to(bias_dtype or dtype)
    for function in s.bias_function:
        bias = function(bias)
    return weight, bias, (None, None, None)


def uncast_bias_weight(s: Any, weight: Any, bias: Any, offload_stream: Any) -> None:
    global opened
    opened -= 1


class Linear(CastWeightBiasOp, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._used(x))


class Conv2d(CastWeightBiasOp, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self._used(x))


class LayerNorm(CastWeightBiasOp, nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, *self._used(x), self.eps)


def _by_row(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *(1,) * (x.ndim - 1))


class EPS:
    sigma_data = 1.0

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise * self._weights(sigma, noise)[0] / self.sigma_data

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_input - _by_row(sigma, model_input) * model_output

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return latent_image + _by_row(sigma, noise) * noise

    def _weights(self, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        relative = _by_row(sigma, x) / self.sigma_data
        return (1 + relative**2).rsqrt(), relative * (1 + relative**2).rsqrt()


class V_PREDICTION(EPS):
    sign = -1

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        alpha, by = self._weights(sigma, model_input)
        return alpha**2 * model_input + self.sign * by * self.sigma_data * model_output


class EDM(V_PREDICTION):
    sign = 1


class X0(EPS):
    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_output


class IMG_TO_IMG(X0):
    pass


class CONST:
    noise_scale = 1.0

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_input - _by_row(sigma, model_input) * model_output

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        by = _by_row(sigma, noise)
        return by * self.noise_scale * noise + (1 - by) * latent_image


class COSMOS_RFLOW:
    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise / (1 + _by_row(sigma, noise))

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        by = _by_row(sigma, model_input)
        return (model_input - by * model_output) / (1 + by)

    noise_scaling = EPS.noise_scaling


class ModelSamplingDiscrete(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        powers = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
        self.register_buffer("sigmas", ((1 - powers) / powers).sqrt().float())

    def sigma(self, timestep: Tensor) -> Tensor:
        sigmas: Tensor = self.sigmas
        return sigmas[timestep.long()]

    def timestep(self, sigma: Tensor) -> Tensor:
        sigmas: Tensor = self.sigmas
        return (sigmas[:, None] - sigma).abs().argmin(0)


class ModelSamplingContinuousEDM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sigma_data = 0.5
        self.register_buffer("sigmas", torch.linspace(-6, 4, 1000).exp())

    def timestep(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()


class ModelSamplingDiscreteFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift, self.multiplier, self.noise_scale = 3.0, 1000, 1.0
        self.register_buffer("sigmas", torch.linspace(0.001, 1, 1000))

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.multiplier


class ModelSamplingFlux(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = 1.15

    def percent_to_sigma(self, percent: float) -> float:
        return 1 - percent

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma


class ModelSamplingCosmosRFlow(ModelSamplingContinuousEDM):
    def __init__(self) -> None:
        super().__init__()
        self.sigma_data = 1.0

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)


class CONDRegular:
    def __init__(self, cond: Any) -> None:
        self.cond = cond

    def process_cond(self, batch_size: int, **others: Any) -> Any:
        return type(self)(self.cond)

    def concat(self, others: Sequence[Any]) -> Any:
        return torch.cat([self.cond, *(one.cond for one in others)])


class CONDConstant(CONDRegular):
    def can_concat(self, other: Any) -> bool:
        return bool(self.cond == other.cond)

    def concat(self, others: Sequence[Any]) -> Any:
        return self.cond


class CONDList(CONDRegular):
    def concat(self, others: Sequence[Any]) -> Any:
        return [torch.cat(parts) for parts in zip(self.cond, *(one.cond for one in others), strict=True)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(WIDTH)
        self.qkv = Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(Linear(WIDTH, 2 * WIDTH), nn.GELU(), Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        x += F.scaled_dot_product_attention(query, key, value)
        x += self.mlp(self.norm(x))
        return x


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.patches = Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.text, self.time = Linear(CONTEXT, WIDTH), Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = Linear(WIDTH, CHANNELS)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, kind: int = 0, control: Any = None, **others: Any
    ) -> Tensor:
        if control is not None:
            x = x + control["input"][0]
        rows = self.patches(x).flatten(2).transpose(1, 2) + self.time(timesteps[:, None, None].to(x.dtype) / 1000)
        rows = torch.cat((self.text(context) + kind, rows), 1)
        for block in self.blocks:
            rows = block(rows)
        found = self.last(rows[:, context.shape[1] :])
        return found.transpose(1, 2).reshape(x.shape)


class ControlNet:
    """One whose network adds its hint to the state that it sees."""

    def __init__(self, hint: Tensor, strength: float, percents: tuple[float, float], previous: Any = None) -> None:
        self.cond_hint_original, self.strength, self.timestep_percent_range = hint, strength, percents
        self.previous_controlnet, self.cond_hint, self.timestep_range = previous, None, None
        self.control_model_wrapped = ModelPatcher(BaseModel(Tiny()), torch.device("cpu"))

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        start, end = self.timestep_percent_range
        self.timestep_range = (percent_to_timestep_function(start), percent_to_timestep_function(end))
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_timestep_function)

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, transformer_options: Any) -> Any:
        before = None
        if self.previous_controlnet is not None:
            before = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        if self.timestep_range and not self.timestep_range[1] <= t[0] <= self.timestep_range[0]:
            return before
        if self.cond_hint is None:
            self.cond_hint = F.interpolate(self.cond_hint_original, x_noisy.shape[-2:])
        found = self.strength * (x_noisy + self.cond_hint)
        return {"input": [found if before is None else found + before["input"][0]]}

    def cleanup(self) -> None:
        self.cond_hint = self.timestep_range = None
        if self.previous_controlnet is not None:
            self.previous_controlnet.cleanup()

    def get_models(self) -> list[Any]:
        return [self.control_model_wrapped]

    def get_extra_hooks(self) -> list[Any]:
        return []


class Tiny:
    """The configuration of a model."""


seen: list[dict[str, Any]] = []
"""Options that networks were given."""


def _wrapped(kind: str, function: Any, transformer_options: Mapping[str, Any]) -> Any:
    for wrappers in transformer_options.get("wrappers", {}).get(kind, {}).values():
        for wrapper in wrappers:
            function = functools.partial(wrapper, function)
    return function


class BaseModel(nn.Module):
    def __init__(self, model_config: Any) -> None:
        super().__init__()
        self.model_config = model_config
        self.diffusion_model = Network()
        self.model_sampling: Any = None
        self.manual_cast_dtype: torch.dtype | None = None
        self.latent_format = types.SimpleNamespace(latent_channels=CHANNELS, latent_dimensions=2)
        self.current_patcher: Any = None
        self.needs = ""  # an option of conditionings

    def get_dtype(self) -> torch.dtype:
        return self.diffusion_model.dtype

    def process_latent_in(self, latent: Tensor) -> Tensor:
        return latent * 0.5

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"c_crossattn": CONDRegular(kwargs["cross_attn"])}
        if self.needs:
            found[self.needs] = CONDConstant(kwargs[self.needs])
        if "kind" in kwargs:
            found["kind"] = CONDConstant(kwargs["kind"])
        return found

    def apply_model(self, x: Tensor, t: Tensor, transformer_options: Any = {}, **kwargs: Any) -> Tensor:  # noqa: B006
        found: Tensor = _wrapped("apply_model", self._apply_model, transformer_options)(
            x, t, transformer_options=transformer_options, **kwargs
        )
        return found

    def _apply_model(
        self, x: Tensor, t: Tensor, c_crossattn: Any = None, transformer_options: Any = None, **kwargs: Any
    ) -> Tensor:
        seen.append(transformer_options)
        dtype = self.manual_cast_dtype or self.get_dtype()
        noised = self.model_sampling.calculate_input(t, x).to(dtype)
        time = self.model_sampling.timestep(t).float()
        network = _wrapped("diffusion_model", self.diffusion_model, transformer_options)
        output = network(noised, time, c_crossattn.to(dtype), **kwargs)
        return self.model_sampling.calculate_denoised(t, output.float(), x)


class ModelPatcher:
    def __init__(self, model: BaseModel, load_device: torch.device) -> None:
        self.model, self.load_device = model, load_device
        self.patches: dict[str, Any] = {}
        self.backup: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.object_patches: dict[str, Any] = {}
        self.force_cast_weights = False
        self.offload_device = load_device
        self.wrappers: dict[str, Any] = {}
        self.callbacks: dict[str, Any] = {}
        self.injections: dict[str, Any] = {}
        self.is_injected = False

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def add_callback_with_key(self, call_type: str, key: str, callback: Any) -> None:
        self.callbacks.setdefault(call_type, {}).setdefault(key, []).append(callback)

    def set_injections(self, key: str, injections: Any) -> None:
        self.injections[key] = injections

    def inject_model(self) -> None:
        if not self.is_injected:
            for injection in [one for injections in self.injections.values() for one in injections]:
                injection.inject(self)
                self.is_injected = True

    def eject_model(self) -> None:
        if self.is_injected:
            for injection in [one for injections in self.injections.values() for one in injections]:
                injection.eject(self)
            self.is_injected = False

    def get_nested_additional_models(self) -> list[Any]:
        return []

    def model_dtype(self) -> torch.dtype:
        return self.model.get_dtype()

    def prepare_state(self, timestep: Tensor, model_options: dict[str, Any]) -> None:
        for callbacks in self.callbacks.get("on_prepare_state", {}).values():
            for callback in callbacks:
                callback(self, timestep, model_options)

    def clone(self) -> ModelPatcher:
        other = copy.copy(self)
        other.object_patches = dict(self.object_patches)
        return other

    def is_dynamic(self) -> bool:
        return False

    def set_model_compute_dtype(self, dtype: torch.dtype) -> None:
        self.object_patches["manual_cast_dtype"] = dtype
        self.force_cast_weights = True

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, getattr(self.model, name))

    def load(self) -> None:
        self.model.manual_cast_dtype = self.object_patches.get("manual_cast_dtype")
        for layer in self.model.modules():
            if isinstance(layer, CastWeightBiasOp):
                layer.comfy_cast_weights = self.force_cast_weights
        self.inject_model()

    def pre_run(self) -> None:
        self.model.current_patcher = self

    def cleanup(self) -> None:
        self.model.current_patcher = None


class BypassForwardHook:
    """A layer with an adapter beside it."""

    def __init__(self, module: Any, adapter: Any, multiplier: float = 1.0) -> None:
        self.module, self.adapter, self.multiplier, self.original_forward = module, adapter, multiplier, None

    def _bypass_forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.original_forward(x) + self.multiplier * self.adapter.h(x)
        return found

    def inject(self) -> None:
        if self.original_forward is None:
            self.original_forward = self.module.forward
            self.module.forward = self._bypass_forward

    def eject(self) -> None:
        if self.original_forward is not None:
            self.module.forward, self.original_forward = self.original_forward, None


class Adapter:
    """A LoRA of a Linear layer."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self.weights = (up, down)

    def h(self, x: Tensor) -> Tensor:
        up, down = self.weights
        return x @ down.t() @ up.t()


def bypassing(patcher: Any, path: str, adapter: Any, strength: float) -> Any:
    """A MODEL with an adapter beside a layer."""
    hook = BypassForwardHook(patcher.model.diffusion_model.get_submodule(path), adapter, strength)
    other = patcher.clone()
    other.injections = {
        "bypass_lora": [types.SimpleNamespace(inject=lambda patcher: hook.inject(), eject=lambda patcher: hook.eject())]
    }
    return other


def calculate_weight(patches: Any, weight: Tensor, key: str, intermediate_dtype: Any = None) -> Tensor:
    for strength, adapter, *_ in patches:
        up, down = adapter.weights
        weight += (strength * up @ down).to(weight.dtype)
    return weight


def create_model_options_clone(orig_model_options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: create_model_options_clone(value)
        if isinstance(value, dict)
        else value.copy()
        if isinstance(value, list)
        else value
        for key, value in orig_model_options.items()
    }


def prepare_model_patcher(model: Any, conds: Any, model_options: dict[str, Any]) -> None:
    for kind in ("wrappers", "callbacks"):
        model_options["transformer_options"][kind] = create_model_options_clone(getattr(model, kind))


def cast_to_load_options(model_options: dict[str, Any], device: Any = None, dtype: Any = None) -> None:
    pass


def prepare_mask(noise_mask: Tensor, shape: Sequence[int], device: Any) -> Tensor:
    mask = noise_mask.reshape(-1, 1, *noise_mask.shape[-2:])
    return F.interpolate(mask, shape[-2:], mode="bilinear").expand(shape).to(device)


def encode_model_conds(
    model_function: Any, conds: Any, noise: Tensor, device: Any, prompt_type: str, **kwargs: Any
) -> list[dict[str, Any]]:
    found = []
    for one in conds:
        given = {**kwargs, **one, "noise": noise, "device": device, "prompt_type": prompt_type}
        found.append({**one, "model_conds": {**one["model_conds"], **model_function(**given)}})
    return found


def calc_cond_batch(model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: Any) -> list[Tensor]:
    return _wrapped("calc_cond_batch", _calc_cond_batch, model_options["transformer_options"])(
        model, conds, x_in, timestep, model_options
    )


def _calc_cond_batch(model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: Any) -> list[Tensor]:
    model.current_patcher.prepare_state(timestep, model_options)
    found = []
    for number, (cond,) in enumerate(conds):
        c = {name: one.process_cond(len(x_in), area=None).concat([]) for name, one in cond["model_conds"].items()}
        options = create_model_options_clone(model_options["transformer_options"])
        options |= {"cond_or_uncond": [number], "uuids": [cond["uuid"]], "sigmas": timestep}
        c["transformer_options"] = options
        if "control" in cond:
            c["control"] = cond["control"].get_control(x_in, timestep, c, 1, options)
        if (wrapper := model_options.get("model_function_wrapper")) is not None:
            given = {"input": x_in, "timestep": timestep, "c": c, "cond_or_uncond": [number]}
            found.append(wrapper(model.apply_model, given))
        else:
            found.append(model.apply_model(x_in, timestep, **c))
    return found


class ProgressBar:
    def __init__(self, total: int) -> None:
        self.total = total

    def update_absolute(self, value: int, total: Any = None, preview: Any = None) -> None:
        shown.append(preview)

    def update(self, value: int) -> None:
        pass


shown: list[Any] = []
"""Pictures on a node while it runs."""


def load_torch_file(ckpt: str, safe_load: bool = False) -> dict[str, Tensor]:
    return load_file(ckpt)


def load_lora_for_models(model: Any, clip: Any, lora: Any, strength_model: float, strength_clip: float) -> Any:
    patched = model.clone()
    patched.lora = (lora, strength_model)
    return patched, clip


class KSampler:
    SAMPLERS, SCHEDULERS = ("euler",), ("normal",)


def fix_empty_latent_channels(model: Any, latent_image: Tensor, downscale_ratio_spacial: int | None = None) -> Tensor:
    """Resized for an autoencoder that scales by 4."""
    return latent_image if downscale_ratio_spacial is None else F.interpolate(latent_image, scale_factor=2.0)


def prepare_noise(latent_image: Tensor, seed: int) -> Tensor:
    return torch.randn(latent_image.shape, generator=torch.Generator().manual_seed(seed))


def sample(
    model: Any,
    noise: Tensor,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent_image: Tensor,
    disable_pbar: bool = False,
    seed: Any = None,
) -> Tensor:
    """Noise moved by what a LoRA adds up to; a MODEL in training is refused."""
    throw_exception_if_processing_interrupted()
    assert model.model.current_patcher is None
    lora, strength = getattr(model, "lora", ({}, 0.0))
    return noise + strength * sum(float(one.float().abs().sum()) for one in lora.values())


class CLIP:
    """One whose states are functions of the text, with an option of its own."""

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        return text

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        seed = sum(tokens.encode())
        states = torch.randn(1, 3, CONTEXT, generator=torch.Generator().manual_seed(seed))
        return [[states, {"kind": len(tokens) % 2}]]


class VAE:
    def decode(self, samples_in: Tensor) -> Tensor:
        return samples_in[:, :3].movedim(1, -1).sigmoid()


class TrainLoraNode:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "steps": ("INT", {"default": 16})}}

    @classmethod
    def execute(cls, model: Any, latents: Any, positive: Any, steps: Any, bypass_mode: Any) -> Any:
        if bypass_mode[0]:
            raise RuntimeError("a view was changed in place\nby the network")
        bar = sys.modules["comfy_extras.nodes_train"].ProgressBar(steps[0])
        for _ in range(steps[0]):
            bar.update(1)
        return types.SimpleNamespace(result=({}, {"loss": [0.0] * steps[0]}, steps[0]))


def get_filename_list(folder_name: str) -> list[str]:
    return []


def get_folder_paths(folder_name: str) -> list[str]:
    return [str(Path.cwd() / "models" / folder_name)]


def get_full_path_or_raise(folder_name: str, filename: str) -> str:
    raise FileNotFoundError(filename)


def get_output_directory() -> str:
    return str(Path.cwd())


def get_save_image_path(filename_prefix: str, output_dir: str) -> tuple[str, str, int, str, str]:
    path = Path(output_dir) / filename_prefix
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path.parent), path.name, 1, "", filename_prefix


MODULES: Mapping[str, tuple[Any, ...]] = {
    "comfy.model_management": (
        InterruptProcessingException,
        interrupt_current_processing,
        processing_interrupted,
        throw_exception_if_processing_interrupted,
        cast_to,
        load_models_gpu,
    ),
    "comfy.ops": (cast_bias_weight, uncast_bias_weight, CastWeightBiasOp),
    "comfy.model_sampling": (
        EPS,
        V_PREDICTION,
        EDM,
        X0,
        IMG_TO_IMG,
        CONST,
        COSMOS_RFLOW,
        ModelSamplingDiscrete,
        ModelSamplingContinuousEDM,
        ModelSamplingDiscreteFlow,
        ModelSamplingFlux,
        ModelSamplingCosmosRFlow,
    ),
    "comfy.conds": (CONDRegular, CONDConstant, CONDList),
    "comfy.sample": (fix_empty_latent_channels, prepare_noise, sample),
    "comfy.samplers": (KSampler, calc_cond_batch, encode_model_conds, cast_to_load_options),
    "comfy.sampler_helpers": (prepare_model_patcher, prepare_mask),
    "comfy.lora": (calculate_weight,),
    "comfy.weight_adapter.bypass": (BypassForwardHook,),
    "comfy.sd": (CLIP, VAE, load_lora_for_models),
    "comfy.utils": (ProgressBar, load_torch_file),
    "comfy_extras.nodes_train": (TrainLoraNode, ProgressBar),
    "comfy.model_base": (BaseModel,),
    "comfy.model_patcher": (ModelPatcher, create_model_options_clone),
    "comfy.controlnet": (ControlNet,),
    "comfy.quant_ops": (),
    "folder_paths": (
        get_filename_list,
        get_folder_paths,
        get_full_path_or_raise,
        get_output_directory,
        get_save_image_path,
    ),
}


def install() -> list[str]:
    """Make the stand-in importable; returns the names of its modules."""
    modules = {name: types.ModuleType(name) for name in ("comfy", "comfy_extras", "comfy.weight_adapter")}
    for package in modules.values():
        package.__path__ = []
    for name, members in MODULES.items():
        module = modules[name] = types.ModuleType(name)
        for member in members:
            if name == "comfy.model_sampling":
                member.__module__ = name
            setattr(module, member.__name__, member)
        parent, _, short = name.rpartition(".")
        if parent:
            setattr(modules[parent], short, module)
    modules["comfy.model_management"].in_training = False  # type: ignore[attr-defined]
    modules["comfyui_version"] = types.ModuleType("comfyui_version")
    modules["comfyui_version"].__version__ = VERSION  # type: ignore[attr-defined]
    sys.modules.update(modules)
    return list(modules)


def patcher(prediction: type = CONST, schedule: type = ModelSamplingFlux, dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL of random weights."""

    class ModelSampling(schedule, prediction):  # type: ignore[misc,valid-type]
        pass

    torch.manual_seed(0)
    model = BaseModel(Tiny())
    model.model_sampling = ModelSampling()
    model.diffusion_model.to(dtype).requires_grad_(False).eval()
    model.diffusion_model.dtype = dtype
    return ModelPatcher(model, torch.device("cpu"))


def data(count: int = 3, tokens: Sequence[int] = (5,), **options: Any) -> tuple[list[Tensor], list[list[Any]]]:
    """Latents and a CONDITIONING of as many entries."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(1, CHANNELS, 4, 4, generator=generator) for _ in range(count)]
    contexts = [torch.randn(1, tokens[index % len(tokens)], CONTEXT, generator=generator) for index in range(count)]
    return latents, [[context, dict(options)] for context in contexts]
