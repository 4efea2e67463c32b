"""A LoRA file examined: a summary, and its faults with their remedies.

A fault is about the file alone (values that are not numbers, halves of adapters, odd alphas, changes too small to be
seen) or about the file and a model's names (modules that the model lacks, layers that programs leave out). Each has a
remedy; `Mend` applies it in the file's own spelling, so that it needs no model and changes nothing else. New tensors
are made when they are written, one at a time, so that repairing a large file takes little memory.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lorasmith.adapters.algorithms import facts_of, format_of, size_of, title_of
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef, multiplied
from lorasmith.core.effect import idle_change
from lorasmith.core.errors import LoraError
from lorasmith.formats.acceptance import MISREAD_ALPHAS, misread_alphas, shortfalls
from lorasmith.formats.container import count_non_finite
from lorasmith.formats.layouts.adapter_config import stated_alphas, unread_scales
from lorasmith.formats.layouts.layout import LAYOUTS, Layout
from lorasmith.formats.lora_file import StrangerReason, bundle_of, read_lora_tensors, state_from_tensors, unapplied
from lorasmith.formats.metadata import autov1, need_of, sha256_body, sha256_file, sshs_model_hash, steps_of
from lorasmith.formats.names import ModelNames
from lorasmith.formats.scales import full_alpha, idle_alpha, loras_in, rank_of, scale_of
from lorasmith.formats.spelling import (
    XLABS,
    ModuleTensors,
    all_assembled,
    block_of,
    component_of,
    grouped,
    guessed_family,
    kind_of,
    without_core,
)


@dataclass(frozen=True)
class Mend:
    """Changes of a file's tensors."""

    left_out: frozenset[str] = frozenset()
    # key → function from the old tensor, or None if there was none, to the new one
    changed: Mapping[str, Callable[[Tensor | None], Tensor]] = field(default_factory=dict)


def bases_of(tensors: Mapping[str, Tensor], names: ModelNames) -> dict[ModuleRef, str]:
    """The file's base of each module that is not fused with others."""
    groups = grouped(tensors)
    return {
        parts[0].module: base
        for _, layout in LAYOUTS.items()
        for base, parts in layout.bases(names).items()
        if base in groups and len(parts) == 1
    }


def levelled(
    alphas: Mapping[ModuleRef, float],
    state: AdapterState,
    bases: Mapping[ModuleRef, str],
    tensors: Mapping[str, Tensor],
) -> Mend:
    """Other alphas, compensated in the up matrices."""
    groups = grouped(tensors)
    changed: dict[str, Callable[[Tensor | None], Tensor]] = {}
    for ref, alpha in alphas.items():
        weights, keys = state.adapters[ref], groups[bases[ref]]
        if not format_of(weights).is_low_rank or "alpha" not in keys:
            continue
        now = full_alpha(weights) if weights.alpha is None else weights.alpha
        changed[keys["alpha"]] = scalar(alpha)
        changed[keys["up"]] = _times(now / alpha)
    return Mend(changed=changed)


def scalar(value: float) -> Callable[[Tensor | None], Tensor]:
    """A function that makes a scalar of this value, in the dtype of the old one if that holds it exactly."""

    def make(old: Tensor | None) -> Tensor:
        exact = torch.tensor(value)
        if old is None:
            return exact
        same = exact.to(old.dtype)
        return same if float(same) == value else exact

    return make


def _times(factor: float) -> Callable[[Tensor | None], Tensor]:
    def make(old: Tensor | None) -> Tensor:
        assert old is not None
        return multiplied(old, factor)

    return make


_HUGE_SCALE = 64.0


@dataclass(frozen=True)
class FileFault:
    """A fault of a file, or a difference between programs."""

    problem: str  # in one sentence without a full stop
    remedy: str  # likewise
    is_error: bool  # whether the file is at fault; otherwise programs read it differently
    mend: Mend | None = None  # the repair of `--fix`, for notes of `--fix --notes`; None if it has none


def main_layout(keys: Sequence[str]) -> Layout:
    """The layout of most of a file's keys."""
    return max((layout for _, layout in LAYOUTS.items()), key=lambda layout: layout.detects(keys))


Changes = Iterable[float | None]  # of weights, relative to them; None for one that is not known


def faults_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    names: ModelNames | None,
    *,
    is_model_sure: bool,
    changes_in: Callable[[AdapterState], Changes] | None = None,
) -> list[FileFault]:
    """All faults of a LoRA file. `changes_in` are those of the weights of a model, without which they are estimated."""
    groups = grouped(tensors)
    if not groups and not bundle_of(tensors)[0] and not need_of(metadata):
        problem = f"none of the {len(tensors)} tensors has a name that LoRA files use"
        return [FileFault(problem, "use a LoRA file; a base model goes to --model", True)]
    modules, unfit = all_assembled(tensors, groups, stated_alphas(tensors, groups, metadata))
    state, misread = None, []
    try:
        state = None if names is None else state_from_tensors(tensors, metadata, names)
    except LoraError as problem:
        sentence, _, remedy = str(problem).partition("; ")
        misread = [FileFault(sentence, remedy, True)]
    changes = None if state is None or changes_in is None else changes_in(state)
    file_faults = faults_in_file(tensors, metadata, groups, modules, unfit, main_layout(list(tensors)), changes)
    if state is None or names is None:
        return [*file_faults, *misread]
    return [*file_faults, *_on_model(tensors, state, names, modules.keys(), is_model_sure)]


GroupedKeys = Mapping[str, Mapping[str, str]]
Modules = Mapping[str, ModuleTensors]


def faults_in_file(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    groups: GroupedKeys,
    modules: Modules,
    unfit: Mapping[str, str],
    layout: Layout,
    changes: Changes | None = None,
) -> list[FileFault]:
    """Faults that need no names, from tensors that were `grouped` and `all_assembled`."""
    strangers = list(_strangers(tensors, groups))
    if (strangers or unfit) and (need := need_of(metadata)):
        problem, _, remedy = need.partition("; ")
        return [*_numbers(tensors, groups), FileFault(f"it needs {problem}", remedy, True)]
    return [
        *_numbers(tensors, groups),
        *strangers,
        *_rare_names(groups),
        *_unfit(unfit, groups),
        *_idle(modules, groups, map(nominal_change, modules.values()) if changes is None else changes),
        *_alphas(modules, groups, layout),
        *_scales(modules, metadata),
        *_hash(tensors, metadata),
    ]


def _numbers(tensors: Mapping[str, Tensor], groups: GroupedKeys) -> Iterator[FileFault]:
    """NaN and infinity."""
    bases = {key: base for base, keys in groups.items() for key in keys.values()}
    bad = [key for key, tensor in tensors.items() if count_non_finite(tensor)]
    if bad:
        hit = {bases.get(key, key) for key in bad}
        left_out = {key for base in hit for key in groups.get(base, {"": base}).values()}
        yield FileFault(
            f"{_some(bad, 'tensors hold', 'holds')} NaN or infinity, which spoils every picture",
            "go back to an earlier file; --fix leaves the modules out that have such values",
            True,
            Mend(frozenset(left_out)),
        )


def _strangers(tensors: Mapping[str, Tensor], groups: GroupedKeys) -> Iterator[FileFault]:
    keys = {key for keys in groups.values() for key in keys.values()}
    unknown = [key for key in bundle_of(tensors)[1] if key not in keys]
    if unknown:
        yield FileFault(
            f"{_some(unknown, 'tensors have', 'has')} no name that LoRA files use, so that programs ignore "
            "them or refuse the file",
            "find out what wrote them; --fix leaves them out",
            True,
            Mend(frozenset(unknown)),
        )


# Names that only the program which writes them, and few others, read: pattern on bases → description.
_RARE_NAMES = (
    (re.compile(r"oft_unet_"), "sd-scripts' OFT (oft_unet_), which ComfyUI, LyCORIS and diffusers"),
    (re.compile(rf"{XLABS}$"), "XLabs' trainer, which sd-scripts and LyCORIS"),
)


def _rare_names(groups: GroupedKeys) -> Iterator[FileFault]:
    for pattern, whose in _RARE_NAMES:
        rare = [base for base in groups if pattern.match(base)]
        if rare:
            yield FileFault(
                f"{_some(rare, 'modules have', 'has')} names of {whose} do not look for",
                "convert it with `lorasmith convert --to portable`",
                False,
            )


def _unfit(unfit: Mapping[str, str], groups: GroupedKeys) -> Iterator[FileFault]:
    """Tensors that make no adapter."""
    if unfit:
        yield FileFault(
            f"{_some(list(unfit), 'modules are', 'is')} damaged: {next(iter(unfit.values()))}",
            "get the file again; --fix leaves them out",
            True,
            Mend(frozenset(key for base in unfit for key in groups[base].values())),
        )


def _idle(modules: Modules, groups: GroupedKeys, changes: Changes) -> Iterator[FileFault]:
    """Adapters that are exactly the identity, and a file without an effect."""
    idle = [base for base, module in modules.items() if _changes_nothing(module)]
    if idle and len(idle) == len(modules):
        yield FileFault(
            "all of its modules change nothing, for a factor of each is zero: it was never trained", "train it", True
        )
        return
    if (largest := idle_change(changes)) is not None:
        yield FileFault(
            f"it changes no weight by more than {largest:.1g} of its size, which no picture shows",
            "train it again with a higher learning rate or for longer, with captions, on the layers of the default",
            True,
        )
    if idle:
        yield FileFault(
            f"{_some(idle, 'modules change', 'changes')} nothing, for all values of a factor are zero",
            "nothing needs to be done; --fix --notes leaves them out, for a smaller file",
            False,
            Mend(frozenset(key for base in idle for key in groups[base].values())),
        )


def _changes_nothing(module: ModuleTensors) -> bool:
    if any(bool(tensor.any()) for tensor in module.differences.values()):
        return False
    weights = module.adapter
    if weights is None:
        return True
    form = format_of(weights)
    if {"dora_scale", *form.all_rows} & weights.tensors.keys():
        return False
    return any(not bool(weights.tensors[role].any()) for role in form.vital if role in weights.tensors)


def _alphas(modules: Modules, groups: GroupedKeys, layout: Layout) -> Iterator[FileFault]:
    adapters = {base: module.adapter for base, module in modules.items() if module.adapter}
    ranked = {base: weights for base, weights in adapters.items() if rank_of(weights)}
    if layout.has_alphas:
        yield from _missing_alphas(ranked, groups)
    zero = [base for base, weights in ranked.items() if weights.alpha == 0]
    if zero:
        yield FileFault(
            f"{_some(zero, 'modules have', 'has')} an alpha of zero, by which ComfyUI and diffusers apply nothing and "
            "sd-scripts everything",
            "--fix gives them the alpha of full strength, their rank",
            True,
            Mend(
                changed={
                    groups[base]["alpha"]: scalar(full_alpha(ranked[base])) for base in zero if "alpha" in groups[base]
                }
            ),
        )
    huge = [base for base, weights in ranked.items() if abs(scale_of(weights)) > _HUGE_SCALE]
    if huge:
        first = ranked[huge[0]]
        yield FileFault(
            f"{_some(huge, 'modules have', 'has')} a huge alpha, {first.alpha:g} at rank {rank_of(first)}, which "
            "multiplies the change by more than 64",
            "look at a picture at a low strength, such as 0.1, before you use it",
            False,
        )
    needing = [
        base
        for base, weights in adapters.items()
        if format_of(weights).comfyui_needs_alpha and "alpha" not in groups[base]
    ]
    if needing:
        title = title_of(adapters[needing[0]])
        yield FileFault(
            f"{_some(needing, 'modules have', 'has')} no alpha, without which ComfyUI does not apply {title}",
            "--fix adds the alpha that changes nothing",
            True,
            Mend(changed={f"{base}.alpha": scalar(idle_alpha(adapters[base])) for base in needing}),
        )


def _scales(modules: Modules, metadata: Mapping[str, str]) -> Iterator[FileFault]:
    """Alphas of the header that are not applied."""
    loras = loras_in({base: module.adapter for base, module in modules.items() if module.adapter is not None})
    ranks = {component_of(base): rank_of(lora) or 1 for base, lora in loras.items() if lora.alpha is None}
    for entry, scale in unread_scales(metadata, ranks).items():
        yield FileFault(
            f"its scale is unknown: by the header's {entry} it is {scale:g}, and by ComfyUI, which does not read it, 1",
            f"compare pictures at the strengths 1 and {scale:g}",
            False,
        )


def _missing_alphas(ranked: Mapping[str, AdapterWeights], groups: GroupedKeys) -> Iterator[FileFault]:
    missing = [base for base, weights in ranked.items() if weights.alpha is None]
    if missing:
        everywhere = len(missing) == len(ranked)
        yield FileFault(
            "it has no alphas, which programs take for the ranks"
            if everywhere
            else f"{_some(missing, 'modules have', 'has')} no alpha, though others have",
            f"--fix{' --notes' * everywhere} writes the ranks as alphas, which changes nothing",
            not everywhere,
            Mend(changed={f"{base}.alpha": scalar(full_alpha(ranked[base])) for base in missing}),
        )


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[FileFault]:
    recorded = metadata.get("sshs_model_hash")
    if recorded is not None and not any("/" in key for key in tensors) and recorded != sshs_model_hash(tensors):
        yield FileFault(
            "its tensors are not those that its metadata has the hash of: something changed them and left the hash",
            "trust the metadata less; --fix --notes brings the hash up to date",
            False,
            Mend(),
        )


def _on_model(
    tensors: Mapping[str, Tensor], state: AdapterState, names: ModelNames, whole: Collection[str], is_model_sure: bool
) -> Iterator[FileFault]:
    """Faults from the model's names, by which `state` was read; `whole` are the bases of complete adapters."""
    if not is_model_sure and not state.adapters and not state.differences:
        yield FileFault(
            f"its layers are not those of the released {names.family} model",
            "name its model with --model, for a closer look",
            False,
        )
        return
    kind = f"the {names.family} model" if is_model_sure else f"the released {names.family} model"
    groups = grouped(state.unknown)
    left: dict[StrangerReason, list[str]] = {}
    for part in unapplied(state, names):
        if part.name in whole:
            left.setdefault(part.reason, []).append(part.name)
    for reason, bases in left.items():
        # Other programs apply a fused adapter, and the released model may be another than the user's.
        mends = is_model_sure and reason is not StrangerReason.FUSED
        yield FileFault(
            f"{_some(bases, 'modules have', 'has')} no place in {kind} ({reason.text})",
            f"{reason.remedy}{'; --fix leaves them out' * mends}"
            if is_model_sure or reason in (StrangerReason.FUSED, StrangerReason.NAME)
            else "if your model is another than the released one, name it with --model",
            is_model_sure,
            Mend(frozenset(key for base in bases for key in groups[base].values())) if mends else None,
        )
    if not state.adapters and not state.differences:
        return
    yield from _gaps(state, names)
    yield from _uneven(tensors, state, names)
    layout = main_layout(list(tensors))
    for shortfall in shortfalls(state, layout, names):
        if shortfall.reason != MISREAD_ALPHAS:  # a fault of its own, which can be repaired
            yield FileFault(shortfall.sentence, _other_layout(state, shortfall.program, layout, names), False)


def _gaps(state: AdapterState, names: ModelNames) -> Iterator[FileFault]:
    """Layers that have a change in most blocks but not in all."""
    present = {ref.path for ref in (*state.adapters, *state.differences) if ref.component == DENOISER}
    kinds: dict[str, list[str]] = {}
    for path in names.denoiser:
        kinds.setdefault(_NUMBER.sub("*", _SIDE.sub("*.", path)), []).append(path)
    missing = {
        kind: lacking
        for kind, paths in kinds.items()
        if 0 < len(lacking := [path for path in paths if path not in present]) < len(paths) / 2
    }
    if missing:
        kind, paths = next(iter(missing.items()))
        others = f", and some of {len(missing) - 1} other kinds of layers" if len(missing) > 1 else ""
        yield FileFault(
            f"it lacks {len(paths)} of {len(kinds[kind])} layers {kind}, such as {paths[0]}{others}",
            "nothing needs to be done if they were left out on purpose; otherwise get the file again",
            False,
        )


_SIDE = re.compile(r"^(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _uneven(tensors: Mapping[str, Tensor], state: AdapterState, names: ModelNames) -> Iterator[FileFault]:
    """Alphas that differ where some programs expect one."""
    bases = bases_of(tensors, names)
    wanted = misread_alphas(state, names) if main_layout(list(tensors)).alphas_misread else {}
    if wanted:
        yield FileFault(
            f"{_some([ref.path for ref in wanted], 'modules have', 'has')} another alpha than most, which diffusers "
            "ignores in attention layers and text encoders, so that it applies them at a wrong strength",
            "--fix --notes gives them the alpha of the others and changes their factors accordingly",
            False,
            levelled({ref: alpha for ref, alpha in wanted.items() if ref in bases}, state, bases, tensors),
        )
    groups: dict[str, list[ModuleRef]] = {}
    for ref, weights in state.adapters.items():
        if ref in bases and ref not in wanted and weights.alpha is not None and rank_of(weights):
            place = names.denoiser.get(ref.path) if ref.component == DENOISER else None
            if place is not None and place.rows is not None:
                groups.setdefault(place.path, []).append(ref)
    odd = {
        ref: scale_of(state.adapters[refs[0]]) * (rank_of(state.adapters[ref]) or 1)
        for refs in groups.values()
        for ref in refs
        if scale_of(state.adapters[ref]) != scale_of(state.adapters[refs[0]])
    }
    if odd:
        yield FileFault(
            f"{_some([ref.path for ref in odd], 'modules have', 'has')} another alpha than the layers with which the "
            "original model fuses them (q, k, v), where programs that fuse them expect one",
            "--fix --notes gives them one scale and changes their factors accordingly",
            False,
            levelled(odd, state, bases, tensors),
        )


def _other_layout(state: AdapterState, program: str, layout: Layout, names: ModelNames) -> str:
    """Remedy with the layout that the program would apply completely."""
    for name, other in LAYOUTS.items():
        if other is layout or other.losses(state, names):
            continue
        if not any(shortfall.program in (program, other.title) for shortfall in shortfalls(state, other, names)):
            return f"convert it with `lorasmith convert --to {name}` for {program}"
    return f"use another program than {program} for it"


def _some(things: Sequence[str], several: str, singular: str) -> str:
    """`3 modules are, such as x,` or `x is`."""
    if len(things) == 1:
        return f"{things[0]} {singular}"
    noun, verb = several.split(" ", 1)
    return f"{len(things)} {noun}, such as {things[0]}, {verb}"


@dataclass(frozen=True)
class LoraSummary:
    """A LoRA file at a glance."""

    path: Path
    size_bytes: int
    layouts: Mapping[str, int]  # number of keys by the layout that detects them
    words: Mapping[str, Mapping[str, int]]  # number of vectors of each word that it holds, by encoder (`clip_l`)
    family: str | None  # title of the family recognised by names and shapes, or None
    components: Mapping[str, int]  # number of modules by component (`denoiser`, `text_encoder`, ...)
    layers: Mapping[str, int]  # number of modules by kind of layer (`attn1_to_q`, `ff_net_2`), in the file's spelling
    algorithms: Mapping[str, int]  # number of modules by algorithm; `difference` for those with differences alone
    magnitudes: Mapping[str, int]  # number of modules with DoRA's magnitudes, by axis (`output`, `input`)
    ranks: Mapping[int, int]  # number of modules by rank
    factors: Mapping[int, int]  # number of modules by LoKr's factor
    block_sizes: Mapping[int, int]  # number of modules by OFT's or BOFT's block size
    alphas: Mapping[float | None, int]  # number of modules by alpha (None: the file states none)
    tensors: int
    parameters: int  # without alphas
    dtypes: Mapping[str, int]  # number of tensors by dtype, as `bfloat16`
    # Frobenius norm of the weight change at strength 1 by block. OFT, BOFT and GLoRA, whose change depends on the
    # weight, and DoRA's magnitudes are left out.
    norms: Mapping[str, float]
    steps: int  # optimizer updates, 0 if unknown
    metadata: Mapping[str, str]  # all of the header's
    hashes: Mapping[str, str]  # `sha256`, `autov1`, `autov2`, `autov3`
    findings: tuple[str, ...]  # one sentence for each fault of the file


def describe(path: Path) -> LoraSummary:
    """Summary of a LoRA file, or of a PEFT or diffusers folder.

    Tensors are memory-mapped, and read one module at a time.
    """
    path = Path(path)
    tensors, metadata = read_lora_tensors(path)
    groups, words = grouped(tensors), bundle_of(tensors)[0]
    if not groups and not words and not need_of(metadata):
        raise LoraError(f"{path} is not a LoRA: none of its {len(tensors)} tensors has a name that LoRA files use")
    whole, unfit = all_assembled(tensors, groups, stated_alphas(tensors, groups, metadata))
    adapters = {base: module.adapter for base, module in whole.items() if module.adapter is not None}
    layouts = {name: layout.detects(tensors) for name, layout in LAYOUTS.items()}
    main_layout = LAYOUTS[max(layouts, key=lambda name: layouts[name])]
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return LoraSummary(
        path=path,
        size_bytes=sum(file.stat().st_size for file in files),
        layouts={name: count for name, count in layouts.items() if count},
        words={word: {key: len(vector) for key, vector in vectors.items()} for word, vectors in words.items()},
        family=guessed_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata),
        components=_counted(component_of(base) for base in groups),
        layers=_counted(kind_of(base) for base in groups),
        algorithms=_counted(module.adapter.algorithm if module.adapter else "difference" for module in whole.values()),
        magnitudes=_counted(
            "output" if weights.tensors["dora_scale"].shape[0] > 1 else "input"
            for weights in adapters.values()
            if "dora_scale" in weights.tensors
        ),
        ranks=_counted(rank for weights in adapters.values() if (rank := rank_of(weights)) is not None),
        factors=_sizes("factor", adapters.values()),
        block_sizes=_sizes("block size", adapters.values()),
        alphas=_counted(weights.alpha for weights in adapters.values()),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha")),
        dtypes=_counted(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()),
        norms=_block_norms(whole),
        steps=steps_of(metadata, path.name),
        metadata=metadata,
        hashes=_hashes(files[0]) if len(files) == 1 else {},
        findings=tuple(
            fault.problem
            for fault in faults_in_file(tensors, metadata, groups, whole, unfit, main_layout)
            if fault.is_error
        ),
    )


def squared_change(module: ModuleTensors) -> float | None:
    """Squared Frobenius norm of a module's change at strength 1.

    None if the change depends on the weight: OFT, BOFT, GLoRA. DoRA's magnitudes, which do so too, are left out.
    """
    total = sum(float(tensor.float().square().sum()) for tensor in module.differences.values())
    weights = module.adapter
    if weights is None:
        return total
    squared_norm = format_of(weights).squared_norm
    if squared_norm is None:
        return None
    plain = without_core(weights)
    return total + scale_of(plain) ** 2 * squared_norm(plain.tensors)


def nominal_change(module: ModuleTensors) -> float | None:
    """A module's change relative to a weight that keeps the size of its input: orthonormal rows, of norm √out.

    Trained weights have about that norm, within a factor of five. None if the change depends on more of the weight:
    DoRA, GLoRA, rescaled rotations.
    """
    weights, square = module.adapter, squared_change(module)
    rows = next((len(difference) for difference in module.differences.values()), 1)
    if weights is not None:
        form = format_of(weights)
        rows = form.shape_of(weights)[0]
        if {"dora_scale", *form.all_rows} & weights.tensors.keys():
            return None
        if square is None and form.bounded is not None:  # ‖R − I‖ ≤ 2 ‖B − Bᵀ‖ ≤ 4 ‖B‖ of a rotation by blocks B
            square = sum(16 * float(weights.tensors[role].float().square().sum()) for role in form.vital)
    return None if square is None else math.sqrt(square / rows)


T = TypeVar("T", bound=Hashable)


def _counted(values: Iterable[T]) -> dict[T, int]:
    """How often each value occurs, most frequent first."""
    return dict(collections.Counter(values).most_common())


def _sizes(meaning: str, adapters: Iterable[AdapterWeights]) -> dict[int, int]:
    """Number of adapters by the value of `rank`, for algorithms in which it has this meaning."""
    return _counted(
        size
        for weights in adapters
        if facts_of(weights.algorithm).rank_meaning == meaning and (size := size_of(weights))
    )


def _hashes(file: Path) -> dict[str, str]:
    digest = sha256_file(file)
    return {"sha256": digest, "autov1": autov1(file), "autov2": digest[:10], "autov3": sha256_body(file)[:12]}


def _block_norms(modules: Mapping[str, ModuleTensors]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for base, module in modules.items():
        change = squared_change(module)
        if change is not None:
            name = ".".join(part for part in (component_of(base), block_of(base)) if part)
            squares[name] = squares.get(name, 0.0) + change
    return {name: math.sqrt(square) for name, square in squares.items()}
