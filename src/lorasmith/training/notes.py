"""Remarks before a run: settings without effect, and results that some programs do not apply completely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from lorasmith.adapters.adapter import ADAPTERS, Adapter
from lorasmith.adapters.frozen_layer import FrozenLayer, is_targetable, packable_layers, packed_layers
from lorasmith.adapters.frozen_weights import format_in_model, takes_products
from lorasmith.adapters.full import FullAdapter
from lorasmith.adapters.inject import AdapterPlan, Difference
from lorasmith.adapters.lora import LoraAdapter
from lorasmith.adapters.variants import OutputDora, droppable, rank_ordered
from lorasmith.core import quantized_products
from lorasmith.core.adapter_state import COMFYUI, DENOISER, AdapterState, ModuleRef
from lorasmith.core.blocks import units
from lorasmith.core.options import options_of
from lorasmith.core.printable import count_text
from lorasmith.core.quantization import packed
from lorasmith.formats.acceptance import shortfalls
from lorasmith.formats.lora_file import PORTABLE, layout_for
from lorasmith.formats.names import encoder_module
from lorasmith.training.config import TrainConfig
from lorasmith.training.memory.compilation import compilable
from lorasmith.training.trainable import Facts, Trainable


class ReportNote(str):
    """A note for the report only: the user need not do anything."""

    __slots__ = ()


class OtherProgram(str):
    """A note on what a program other than ComfyUI does not load."""

    __slots__ = ()


_FEW = 0.1
"""Share of the layers up to which a capped rank is a remark."""

_SMALL_PART = 0.02
"""Share of a model's layers below which targets are named as few."""


def notes_on(
    config: TrainConfig,
    model: Trainable,
    plan: AdapterPlan,
    adapters: Mapping[str, Adapter],
    differences: int,
    *,
    has_fresh_text: bool,
    adapter: Path | None,
) -> tuple[str, ...]:
    """Remarks on a planned run, one sentence each; `config` is as requested, `differences` counts modules.

    `adapter` is as of `on_distilled`.
    """
    return (
        *_on_base(config, model, adapter),
        *_on_experts(config, model),
        *config.idle_settings(),
        *_on_quantization(config, model),
        *_on_shift(config, model),
        *_on_weighting(config, model),
        *_on_word(config, model),
        *notes_on_plan(plan),
        *([] if has_fresh_text else _on_own_values(config, plan, adapters, differences)),
        *_on_targets(config, model, plan, adapters, differences),
        *_on_compiling(config, model, adapters),
    )


def notes_on_file(
    model: Trainable,
    adapters: Mapping[str, Adapter],
    differences: Mapping[str, Difference],
    text_adapters: Mapping[str, Adapter],
) -> tuple[str, ...]:
    """One sentence for each program that will not apply all of the LoRA in the default layout."""
    names = model.names
    if not model.facts.family_title:  # other programs do not know a network of one's own
        return ()
    modules = {ModuleRef(DENOISER, path): adapter for path, adapter in adapters.items()}
    modules |= {encoder_module(names, path): adapter for path, adapter in text_adapters.items()}
    whole = {ref: adapter.diff.detach() for ref, adapter in modules.items() if isinstance(adapter, FullAdapter)}
    state = AdapterState(
        {ref: adapter.to_weights() for ref, adapter in modules.items() if ref not in whole},
        {ref: {"weight": diff} for ref, diff in whole.items()}
        | {ModuleRef(DENOISER, path): difference.to_tensors() for path, difference in differences.items()},
    )
    losses = shortfalls(state, layout_for(PORTABLE, names, state), names, is_portable=True)
    # Parts that a program ignores are a remark; a LoRA that it does not load at all is a warning.
    notes = [
        (ReportNote if not shortfall.is_all else str if shortfall.program == COMFYUI else OtherProgram)(
            f"{shortfall.sentence}."
        )
        for shortfall in losses
    ]
    if any(isinstance(adapter, OutputDora) for adapter in adapters.values()):
        notes.append(ReportNote("Magnitudes per input (dora input) are the kind that ComfyUI reproduces."))
    return tuple(notes)


def notes_on_plan(plan: AdapterPlan) -> tuple[str, ...]:
    """Remarks on capped ranks, and exclusions that match no layer."""
    notes = [f"!{name} excludes nothing: no layer of this model matches it." for name in plan.idle]
    if plan.capped:
        first = plan.capped[0]
        note = (
            f"Rank {first.asked} exceeds the size of {len(plan.capped)} of {len(plan.adapters)} layers, whose rank is "
            f"capped, such as to {first.rank} at {first.path}."
        )
        notes.append(ReportNote(note) if len(plan.capped) <= _FEW * len(plan.adapters) else note)
    return tuple(notes)


def notes_on_products(config: TrainConfig, model: Trainable, device: torch.device) -> tuple[str, ...]:
    """A note on how many layers products in another format are in, if that is set but not of all."""
    kind = config.products
    if kind == "training_dtype":
        return ()
    facts = quantized_products.PRODUCT_KINDS[kind]
    side = facts.multiple
    own = packed(torch.zeros(side, side), config.quantization, torch.float32).format
    kept = config.quantization == "none"
    formats = {layer: format_in_model(layer) if kept else own for layer in packable_layers(model.module)}
    fitting = sum(takes_products(layer, kind, layer_format) for layer, layer_format in formats.items())
    if not any(layer_format is not None and layer_format.products == kind for layer_format in formats.values()):
        return (
            f"products {kind} has no effect with quantization {config.quantization}: it needs weights in {kind}, as "
            f"with quantization {facts.quantization}.",
        )
    if not quantized_products.has_products(kind, device):
        return (
            f"products {kind} has no effect on {device}, which has no products in {kind} ({facts.device}); all are in "
            "training_dtype.",
        )
    if facts.needs_compiler(device) and not config.compile:
        return (
            f"products {kind} has no effect without compile: packing activations in {kind} then takes longer than the "
            "products save; turn compile on, or leave products out.",
        )
    if fitting == len(formats):
        return ()
    return (
        f"products {kind} applies to {fitting} of {len(formats)} layers; the others use training_dtype, because they "
        f"are convolutions, have no {kind} weight, or sizes that {facts.multiple} does not divide.",
    )


def on_distilled(facts: Facts, adapter: Path | None) -> str:
    """What is said of training a distilled model without a training adapter; empty for other models.

    `adapter` is the file of the usual one, if the user has it.
    """
    if facts.distilled_mark is None:
        return ""
    repository, _, usual = facts.usual_adapter.rpartition("/")
    remedy = "a LoRA made for that"
    if adapter is not None:
        remedy = f"the LoRA made for that, which is there (--training-adapter {adapter})"
    elif usual:
        remedy = f"the LoRA made for that, {usual} of {repository}, in models/loras"
    return (
        f"{facts.title} is a model distilled to few steps, as {facts.distilled_mark} in its name says, which training "
        f"undoes; train on the base model of {facts.family_title}, or set training_adapter to {remedy}."
    )


def _on_base(config: TrainConfig, model: Trainable, adapter: Path | None) -> Iterator[str]:
    """Remarks on what a base model lacks, or is."""
    title, facts = model.title, model.facts
    if config.training_guidance and not facts.takes_guidance:
        yield f"training_guidance {config.training_guidance:g} has no effect on {title}, which has no such input."
    if config.training_adapter is None and (remark := on_distilled(facts, adapter)):
        yield remark


def _on_quantization(config: TrainConfig, model: Trainable) -> Iterator[str]:
    """Share of the model that quantization applies to, and what it does not apply to."""
    if config.quantization == "none":
        return
    packable = sum(layer.get_parameter("weight").numel() for layer in packable_layers(model.module))
    if not packable:
        yield f"quantization {config.quantization} has no effect: the model has no plain Linear layers or convolutions."
        return
    share = packable / sum(parameter.numel() for parameter in model.module.parameters())
    yield ReportNote(
        f"quantization {config.quantization} applies to {share:.1%} of the frozen weights: Linear layers and "
        "convolutions."
    )
    if again := len(packed_layers(model.module)):
        yield (
            f"{again} of these weights are quantized in the checkpoint already and rounded a second time; use "
            "quantization none to keep them."
        )


def _on_word(config: TrainConfig, model: Trainable) -> Iterator[str]:
    if model.word is None:
        return
    yield ReportNote(
        f"Prompts for ComfyUI name {model.word.text} by its file: put NAME_emb.safetensors into models/embeddings, and "
        "write embedding:NAME_emb."
    )
    if config.new_word_bundle:
        yield OtherProgram(
            "diffusers refuses a LoRA that holds a word; with new_word_bundle off it loads both, the LoRA and "
            "NAME_emb.safetensors."
        )


def _on_experts(config: TrainConfig, model: Trainable) -> Iterator[str]:
    facts = model.facts
    named = facts.expert
    chosen = config.min_noise is not None or config.max_noise is not None
    if named is not None and not chosen:
        low, high = named.noise_range
        yield (
            f"{facts.title} is the {named.name} expert of {facts.family_title}, as its name says, and is trained on "
            f"its noise levels, {low:g} to {high:g}; --min-noise 0 trains on all of them."
        )
        others = [facts.path / expert.folder for expert in facts.experts if expert != named] if facts.path else []
        if others and others[0].is_dir():
            yield f"The other expert is in the same folder; --low-noise-model {others[0]} trains it as well."


def _on_shift(config: TrainConfig, model: Trainable) -> Iterator[str]:
    own = model.diffusion.schedule.shift
    if config.timestep_shift is not None and math.isclose(config.timestep_shift, own) and config.timesteps != "shifted":
        yield f"timestep_shift {config.timestep_shift:g} has no effect: it is this model's own."


def _on_weighting(config: TrainConfig, model: Trainable) -> Iterator[str]:
    is_own = model.diffusion.parameterization in ("flow", "v") and config.objective == "native"
    if config.loss_weighting == "sigma_sqrt" and is_own:
        yield "loss_weighting sigma_sqrt has no effect with objective native here, as it is the loss of the prediction."


def _on_own_values(
    config: TrainConfig, plan: AdapterPlan, adapters: Mapping[str, Adapter], differences: int
) -> Iterator[str]:
    idle = [
        name for name, declared in options_of(TrainConfig).items() if declared.of_fresh and not config.is_default(name)
    ]
    if not plan.adapters and idle:
        why = "every target continues existing_lora with its own values" if adapters else "there are no targets"
        yield f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: {why}."
    rated = [adapter for adapter in plan.adapters if adapter.learning_rate is not None]
    if config.learning_rate is not None and len(rated) == len(adapters) > 0 and not differences:
        yield f"learning_rate {config.learning_rate:g} has no effect: every target has one of its own."


def _on_targets(
    config: TrainConfig, model: Trainable, plan: AdapterPlan, adapters: Mapping[str, Adapter], differences: int
) -> Iterator[str]:
    count = sum(is_targetable(module) for module in model.module.modules())
    if 0 < len(adapters) < _SMALL_PART * count and model.word is None and model.encoders is None:
        yield (
            f"targets match {len(adapters)} of {count_text(count, 'layer')}, such as {next(iter(adapters))}, by which "
            "a LoRA can change little; `lorasmith targets` lists what others match."
        )
    if config.tucker and plan.adapters:
        layers = (FrozenLayer(model.module.get_submodule(target.path)) for target in plan.adapters)
        if not any(map(LoraAdapter.has_core, layers)):
            yield "tucker has no effect: no target is a convolution larger than 1×1."
    if (config.rank_dropout or config.module_dropout) and (spared := len(adapters) - len(droppable(adapters))):
        yield f"Dropout does not apply to {spared} of {len(adapters)} layers, whose algorithm has none."
    if config.tlora != "none":
        if spared := len(adapters) - len(rank_ordered(adapters)):
            yield f"tlora does not apply to {spared} of {len(adapters)} layers, which are not plain LoRAs."
        if config.tlora == "orthogonal" and not plan.adapters:
            yield "tlora orthogonal is plain here, as every target continues existing_lora with its own values."
        yield ReportNote(
            "Only Lorasmith uses fewer ranks where there is more noise, as in training; other programs use all of "
            "them everywhere, unless they load the parts that `lorasmith bands` cuts the LoRA into."
        )
    if not config.is_default("differences") and not differences:
        yield f"differences {config.differences} has no effect: the model has none of those parameters."


def _on_compiling(config: TrainConfig, model: Trainable, adapters: Mapping[str, Adapter]) -> Iterator[str]:
    if not config.compile:
        return
    module = model.module
    blocks = units(module)
    on_layer = {module.get_submodule(path): adapter for path, adapter in adapters.items()}
    inside = [[on_layer[layer] for layer in block.modules() if layer in on_layer] for block in blocks]
    left = [some for some in inside if not compilable(some)]
    if not left and blocks:
        return
    kinds = sorted(
        {ADAPTERS.canonical(adapter.algorithm) for some in left for adapter in some if not compilable([adapter])}
    )
    if len(left) < len(blocks):
        yield (
            f"compile skips {len(left)} of {len(blocks)} blocks, whose adapters ({', '.join(kinds)}) torch does not "
            "compile."
        )
    elif left:
        yield f"compile has no effect: every block has adapters ({', '.join(kinds)}) that torch does not compile."
    else:
        yield "compile has no effect: the model repeats no blocks."
