"""The memory that a run needs, without loading weights, and the cheapest settings that fit a card.

A forward pass on the meta device counts the activations as `activations auto` does (`memory_plan`). Settings that
change no numbers come first: ways to keep activations, then offloading of up to 30 % of the blocks, whose copies are
hidden behind the computation. Quantization follows, and the offloading of all blocks, which is the slowest; where
weights in nf4 do not fit as a whole, those of the file are offloaded, which change no numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorasmith.adapters.frozen_layer import packable_layers
from lorasmith.adapters.frozen_weights import frozen_bytes, offloaded_bytes
from lorasmith.adapters.inject import Attached, adapters_attached
from lorasmith.bench.benchmark import latent_side
from lorasmith.bench.measure import synthetic_samples
from lorasmith.core.choices import Quantization
from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.placement import best_device, dtype_name, fast_dtype, full_precision
from lorasmith.core.quantization import WEIGHT_SOURCE, weight_source
from lorasmith.data.dataset import Sample
from lorasmith.families.forms import NO_CONTROLS
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model import Model
from lorasmith.families.model_search import FoundPart, load_completed
from lorasmith.families.parts.encoders import ENCODERS
from lorasmith.runs.command_lines import arguments_for
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import TrainJob, plan_job
from lorasmith.training.memory.memory_plan import MemoryPlan, measured_plans, optimizer_bytes
from lorasmith.training.optim.flat import buffer_bytes
from lorasmith.training.way import Way, dtype_on_device

_KINDS: tuple[Quantization, ...] = ("none", "int8", "nf4")
"""Quantizations that are proposed; those in fp8 take the memory of int8, and change the weights more."""

_META = torch.device("meta")

_DRIVER_BYTES = 512 * 2**20  # memory of a card that the driver and its libraries take in each process

DESKTOP_BYTES = 768 * 2**20
"""Memory of a card that a desktop takes if the card drives a display: between half a GiB and one."""

_SHARES = (0.1, 0.2, 0.3)  # of blocks that are offloaded rather than quantized


@dataclass(frozen=True)
class Proposal:
    """Settings of a run, and the memory that a step needs with them."""

    quantization: Quantization
    offloading_share: float  # of the blocks; 0 without offloading
    sharding: bool
    plan: MemoryPlan  # how activations are kept, with their memory and what is left for them
    weights_bytes: int  # frozen weights on the card
    needed_bytes: int  # everything on the card at the peak of a step
    host_bytes: int  # offloaded weights in host memory

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        depth = self.plan.checkpoint_depth
        activations = "auto" if self.plan.kept_blocks > 1 else self.plan.activations
        return {
            **({"quantization": self.quantization} if self.quantization != "none" else {}),
            **({"offloading": True} if self.offloading_share else {}),
            **({"offloading_share": self.offloading_share} if 0 < self.offloading_share < 1 else {}),
            **({"sharding": True} if self.sharding else {}),
            **({"activations": activations} if activations != "keep" else {}),
            **({"gradient_checkpointing": True} if depth and activations == "keep" else {}),
            **({"checkpoint_depth": depth} if depth > 1 and activations == "keep" else {}),
        }

    @property
    def flags(self) -> list[str]:
        """The settings as flags of `lorasmith train`."""
        return arguments_for(self.settings)

    @property
    def short_bytes(self) -> int:
        """The memory that is missing on the card; 0 if it fits."""
        return max(0, self.plan.needed_bytes - self.plan.budget_bytes)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The memory that a run needs. Mappings by quantization are bytes of frozen weights on one card."""

    model: str  # title
    family: str  # title
    found: tuple[FoundPart, ...]  # parts found in the model folders
    pixels: int  # side of the square pictures
    frames: int  # of clips; 1 for pictures
    controls: tuple[tuple[int, int], ...]  # (width, height) in pixels of what each picture is edited from or refers to
    batch_size: int  # images per forward pass
    dtype: str  # of matrix products
    trained: str  # algorithm, targets and parameter count in one line
    parameters: int  # number of trained parameters
    card_bytes: int
    weights: Mapping[Quantization, int]  # `none` is the model's own format
    offloaded: Mapping[Quantization, int]  # with all blocks offloaded
    partly: Mapping[Quantization, Mapping[float, int]]  # by share of offloaded blocks
    on_host: Mapping[Quantization, Mapping[float, int]]  # bytes of offloaded blocks in host memory, by their share
    sharded: Mapping[Quantization, int]  # with sharding; empty for one card
    trained_bytes: int  # trained weights, gradients and optimizer state
    plans: tuple[MemoryPlan, ...]  # ways to keep activations, cheapest first, with their memory
    text_encoders: Mapping[str, int]  # bytes of each, used while captions are encoded
    missing: Mapping[str, str]  # file to get for each text encoder neither given nor found
    unpacked_bytes: int  # the largest quantized weight while it is unpacked
    desktop_bytes: int = 0  # of the card's memory that is left to a desktop

    @cached_property
    def proposal(self) -> Proposal:
        """The cheapest settings that fit the card, or those that miss by the least."""
        proposals = list(self._proposals())
        fitting = (proposal for proposal in proposals if proposal.plan.fits)
        return next(fitting, min(proposals, key=lambda proposal: proposal.short_bytes))

    @property
    def fits(self) -> bool:
        """Whether training fits."""
        return self.proposal.plan.fits

    @property
    def encoders_fit(self) -> bool:
        """Whether all text encoders fit at once, as they are used before training; otherwise some are streamed."""
        return sum(self.text_encoders.values()) <= self.card_bytes - self._taken_bytes

    @property
    def _taken_bytes(self) -> int:
        return _DRIVER_BYTES + self.desktop_bytes

    def _proposals(self) -> Iterator[Proposal]:
        """All settings, cheapest first."""
        for kind, share, sharding in (*self._ways(), *((kind, 1.0, False) for kind in self.offloaded)):
            size, plain = (self._size(weights, share, sharding) for weights in (kind, "none"))
            if kind != "none" and size >= plain:
                continue  # the checkpoint is already quantized to that size
            held = self._taken_bytes + size + self.trained_bytes + (self.unpacked_bytes if kind != "none" else 0)
            fitted = [plan.within(self.card_bytes - held, fills=share < 1) for plan in self.plans]
            host = self.on_host[kind][share] if share else 0
            for plan in sorted(fitted, key=attrgetter("extra_time")):
                yield Proposal(kind, share, sharding, plan, size, held + plan.needed_bytes, host)

    def _ways(self) -> Iterator[tuple[Quantization, float, bool]]:
        """Quantization, share of offloaded blocks and sharding, cheapest first, but for the offloading of all."""
        for kind in _KINDS:
            yield kind, 0.0, False
            if kind in self.sharded:
                yield kind, 0.0, True
            if kind != _KINDS[-1]:  # where the next step is quantization
                yield from ((kind, share, False) for share in self.partly[kind])

    def _size(self, kind: Quantization, share: float, sharding: bool) -> int:
        if sharding:
            return self.sharded[kind]
        return self.weights[kind] if not share else self.offloaded[kind] if share == 1 else self.partly[kind][share]


def estimate_memory(
    files: ModelFiles,
    config: TrainConfig,
    *,
    card_bytes: int,
    resolution: int | None = None,
    frames: int = 1,
    controls: int | None = None,
    cards: int = 1,
    folders: Folders | None = None,
) -> MemoryEstimate:
    """Estimate a run on a model from files; see `estimate_of`. `folders` are searched for parts that it lacks."""
    loaded = load_completed(files, folders)
    found = estimate_of(
        loaded.model,
        config,
        card_bytes=card_bytes,
        resolution=resolution,
        frames=frames,
        controls=controls,
        cards=cards,
    )
    return replace(found, found=loaded.found)


def estimate_of(
    model: Model,
    config: TrainConfig,
    *,
    card_bytes: int,
    resolution: int | None = None,
    frames: int = 1,
    controls: int | None = None,
    cards: int = 1,
) -> MemoryEstimate:
    """Estimate a run on a loaded model, whose denoiser is moved to the meta device. Only DoRA reads its weights.

    How weights and activations are kept is proposed, not read from the settings. The side `resolution` is in pixels,
    the model's own if None; `controls` is the number of those of each picture, as many as the model needs if None.
    `cards` is the number of cards of `card_bytes` that train together.
    """
    # An absent card is assumed to support all dtypes; those of the CPU, on which the run is planned, do not count.
    card, dtype = best_device(), "bf16" if config.training_dtype == "auto" else config.training_dtype
    if card.type == "cuda":
        dtype = dtype_on_device(config, model.denoiser.module, card)
    config = replace(config, training_dtype=dtype, exact_dtype=True)
    # The factors of PiSSA and T-LoRA are as large as LoRA's, but computing them decomposes all weights.
    config = replace(
        config,
        pissa=False,
        tlora="none",
        tlora_min_rank=1,
        tlora_alpha=1.0,
        gradient_checkpointing=False,
        activations="keep",
    )
    side, latent = latent_side(model, resolution), model.components.latent
    model.check_clips("frames", frames)
    frames = latent.whole_frames(frames)
    job = plan_job(model.denoiser, config, "cpu")
    family, components, products = model.family, model.components, job.way.dtype

    parts = [part for part in (model.denoiser.module, job.model.encoders) if part is not None]

    def frozen(processes: int) -> dict[Quantization, int]:
        counts = (processes, 1)  # encoders are whole on each card
        return {
            kind: sum(
                frozen_bytes(part, kind=kind, dtype=products, processes=count)
                for part, count in zip(parts, counts, strict=False)
            )
            for kind in _KINDS
        }

    def split(kind: Quantization, share: float) -> tuple[int, int]:
        both = [offloaded_bytes(part, kind=kind, dtype=products, share=share) for part in parts]
        return sum(here for here, _ in both), sum(away for _, away in both)

    weights, sharded = frozen(1), frozen(cards) if cards > 1 else {}
    shared = {kind: {share: split(kind, share) for share in (*_SHARES, 1.0)} for kind in _KINDS}
    layers = packable_layers(model.denoiser.module)
    largest = max((layer.get_parameter("weight").numel() for layer in layers), default=0)
    encoders, beside = {}, _controls(model, side * latent.downscale, controls)
    for name, encoder in components.text_encoders.items():
        own = ENCODERS[family.text_encoders[name].kind].dtype_of(encoder)
        own = fast_dtype(own, card) if card.type == "cuda" else own
        networks = model.text_encoder.networks(name, sees=model.sight is not None and bool(beside))
        encoders[name] = sum(frozen_bytes(part, kind="none", dtype=own) for part in networks)
    return MemoryEstimate(
        model=model.title,
        family=family.title,
        found=(),
        pixels=side * components.latent.downscale,
        frames=frames,
        controls=beside,
        batch_size=config.batch_size,
        dtype=dtype_name(products),
        trained=job.summary,
        parameters=job.parameters,
        card_bytes=card_bytes,
        weights=weights,
        offloaded={kind: sizes[1.0][0] for kind, sizes in shared.items()},
        partly={
            kind: {part_share: size for part_share, (size, _) in sizes.items() if part_share < 1}
            for kind, sizes in shared.items()
        },
        on_host={kind: {part_share: size for part_share, (_, size) in sizes.items()} for kind, sizes in shared.items()},
        sharded=sharded,
        trained_bytes=buffer_bytes(job.parameters, products) + optimizer_bytes(4 * job.parameters),
        plans=_activation_plans(model, job, side, frames, beside),
        text_encoders=encoders,
        missing={name: slot.usual_file for name, slot in family.text_encoders.items() if name not in encoders},
        unpacked_bytes=largest * (4 + products.itemsize),  # in fp32 and in the dtype of products
    )


def _controls(model: Model, side: int, count: int | None) -> tuple[tuple[int, int], ...]:
    """Width and height in pixels of each control, at most; of None, as many as the model needs.

    OptionError if the model takes fewer.
    """
    form = model.control_form if model.control_form.are_files else NO_CONTROLS
    count = int(form.is_required) if count is None else count
    if count > form.most:
        raise OptionError(f"{model.title} ({model.family.title}) {form.count_text}, got {count}; choose fewer")
    return ((side, side) if form.is_aligned else form.size(_LARGE, _LARGE),) * count


_LARGE = 4096  # pixels of the side of a control that is shrunk


def _activation_plans(
    model: Model, job: TrainJob, side: int, frames: int, controls: Sequence[tuple[int, int]]
) -> tuple[MemoryPlan, ...]:
    """Every way to keep activations, measured on the meta device."""
    with on_meta_device(model, job, side, frames, controls) as (samples, way):
        return tuple(measured_plans(job.model, samples, job.config, way, 0, within=_FusedAttention))


@contextlib.contextmanager
def on_meta_device(
    model: Model, job: TrainJob, side: int, frames: int = 1, controls: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[tuple[Sample, ...], Way]]:
    """Inside, the adapters of a job are attached to its model, which stays on the meta device; yields a sample for a
    pass, whose latents have that side, and the way of the job there.
    """
    scale = model.components.latent.downscale
    beside = [(height // scale, width // scale) for width, height in controls]
    tokens, sight = None, model.sight
    if sight is not None and controls:
        tokens = model.family.usual_tokens + sum(sight.tokens(*control) for control in controls)
    samples = synthetic_samples(model, 1, side, side, frames=frames, tokens=tokens, controls=beside)
    way, module = replace(job.way, device=_META), model.denoiser.module
    encoders = job.model.encoders or nn.ModuleDict()
    for network in (module, encoders, *(trained for _, trained in job.trained)):
        _emptied(network, way.dtype)
    with (
        adapters_attached(module, [Attached(job.adapters, differences=job.differences)]),
        adapters_attached(encoders, [Attached(job.text_adapters)]),
        job.model.texts_read(1.0),
        model.family.unread_left_out(module),
        _autocast_on_meta(),
    ):
        yield samples, way


def _emptied(module: nn.Module, dtype: torch.dtype) -> None:
    """Move a module to the meta device, floating-point tensors in `dtype`, packed ones as plain ones."""
    full = full_precision(module)
    for inner in module.modules():
        if weight_source(inner) is not None:
            del inner.__dict__[WEIGHT_SOURCE]
            inner.__dict__.pop("forward", None)
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                empty = _empty_like(parameter, torch.float32 if parameter in full else dtype)
                inner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = _empty_like(buffer, torch.float32 if buffer in full else dtype)


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=_META)


@contextlib.contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Inside, `torch.autocast` treats the meta device as the CPU; some denoisers disable it for their input device."""
    original = torch.autocast.__init__

    def known(self: torch.autocast, device_type: str, *args: Any, **settings: Any) -> None:
        original(self, "cpu" if device_type == _META.type else device_type, *args, **settings)

    torch.autocast.__init__ = known  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]


class _FusedAttention(TorchFunctionMode):
    """Attention inside saves what fused kernels do; on the meta device torch would save all its weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # by which the weights were divided
        ctx.save_for_backward(query, key, value, mask, result, sums)
        return result


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Any:
    return _Attention.apply(query, key, value, attn_mask)
