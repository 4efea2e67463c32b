"""A model's names for LoRA layouts, diffusers' and the original checkpoint's, and tensors converted between them.

Families build these tables from the real module list of a model; layouts only look names up, so that flattened names
(`lora_unet_..._to_q`) are never parsed by guessing which underscore was a dot.

A base (a key without its suffix) names one module, or several that the original checkpoint fuses: original Flux, SD3,
Lumina and Z-Image checkpoints compute q, k and v in one Linear, diffusers in three; each part owns a range of the fused
output rows. Where an adapter can be cut into rows or stacked from them exactly, adapters are translated; for the others
`split` and `fused` return None.

    split   every part keeps the tensors of the columns and gets its rows of the others (LoRA: of the up matrix);
            alpha and rank stay.
    fused   LoRA, LoHa: downs are stacked along the rank and ups put block-diagonally; n parts of rank r give rank
            n·r, and alpha becomes n times as large, so that the scale alpha / rank stays. Parts that share their
            down matrix, as those of a split do, keep it, and with it their rank.
            OFT: blocks are concatenated. LoKr, GLoRA: only parts that share all but their rows.

What cannot be cut: rows of LoKr and OFT inside a block, an OFT whose constraint bounds all its blocks together, BOFT,
and DoRA with a magnitude for each input, which belongs to the whole column.

Some parts also have the two halves of their rows exchanged (shift, scale against scale, shift).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef, multiplied
from lorasmith.core.errors import LoraError
from lorasmith.formats.scales import rank_of, scale_of
from lorasmith.formats.spelling import ModuleTensors, Unfit, assembled, fits, grouped

Naming: TypeAlias = Literal["diffusers", "original"]
"""Whose names modules have."""


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns matches a whole module path; `*` crosses dots."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


@dataclass(frozen=True)
class OriginalName:
    """A diffusers module's place in the original checkpoint."""

    path: str  # dotted module path in the original naming, without `model.diffusion_model.`
    # (start, stop) output rows when the original fuses several modules into one (`qkv`), else None
    rows: tuple[int, int] | None = None
    swap_halves: bool = False  # whether the two halves of the output rows are exchanged (shift, scale ↔ scale, shift)
    # names below `path` of the module's own parameters that are called otherwise there; their numbers may be in another
    # shape
    parameters: Mapping[str, str] = field(default_factory=dict)
    others: tuple[OriginalName, ...] = ()  # its places in files of another naming, which are read and never written

    def tensor(self, leaf: str) -> str:
        """Name there of one of the module's own parameters, such as `weight`."""
        return ".".join(filter(None, (self.path, self.parameters.get(leaf, leaf))))


@dataclass(frozen=True)
class EncoderNames:
    """One text encoder in LoRA files."""

    paths: tuple[str, ...]  # module paths in files; a CLIP's begin with `text_model.`
    kohya: tuple[str, ...]  # prefixes of its keys in kohya's layout; the first is written, all are read
    comfyui: tuple[str, ...]  # ComfyUI's names of it (`clip_l`, `t5xxl`); the first is written, all are read
    # whether its class in transformers has no `text_model.` in its paths since version 5.6
    drops_text_model: bool = False
    comfyui_stem: str = ""  # what ComfyUI's paths have in front of these


@dataclass(frozen=True)
class ProgramLimits:
    """What programs do not apply of a family's LoRA files, as measured in `docs/load-matrix.md`.

    Patterns are those of `fnmatch`, on diffusers' paths of the denoiser.
    """

    unknown_to_comfyui: tuple[str, ...] = ()  # modules that ComfyUI does not find by diffusers' names
    # layouts besides its own that diffusers reads → modules that it finds in them
    diffusers_applies: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"kohya": ("*",), "comfy": ("*",), "ai-toolkit": ("*",)}
    )
    # layouts of these in which diffusers loads more than LoRA → names of these algorithms
    diffusers_also_loads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # whether diffusers refuses a whole file because a module has more than LoRA's factors
    diffusers_refuses_others: bool = False
    # whether diffusers refuses a whole file for a module that it does not find in it
    diffusers_refuses_unknown: bool = False
    # lists of blocks, by the start of their paths. diffusers refuses a file unless it has every linear layer of the
    # first n blocks, n being the number of blocks in the file
    diffusers_whole_blocks: tuple[str, ...] = ()
    # modules for which diffusers reads one alpha in kohya's layout, the most frequent one. If there are any, it does so
    # for all modules of a text encoder too
    diffusers_one_alpha: tuple[str, ...] = ()
    # modules that sd-scripts' own network loads; None if sd-scripts has no such models
    sd_scripts_applies: tuple[str, ...] | None = ("*",)


@dataclass(frozen=True)
class ModelNames:
    """Names of one loaded model."""

    family: str  # registered family name
    # diffusers path of every module that can carry an adapter or a difference (Linear, convolution, norm, embedding) →
    # its place in the original checkpoint
    denoiser: Mapping[str, OriginalName]
    peft_prefix: str  # the denoiser's name in diffusers' pipelines and so in its keys, `unet` or `transformer`
    # submodules of the denoiser that are parts of diffusers' pipelines themselves, of the same name
    denoiser_parts: tuple[str, ...] = ()
    # by component (`text_encoder`, `text_encoder_2`)
    text_encoders: Mapping[str, EncoderNames] = field(default_factory=dict)
    kohya_naming: Naming = "diffusers"  # naming of this family's `lora_unet_` keys by convention
    ai_toolkit_naming: Naming = "original"  # naming of this family's `diffusion_model.` keys in ai-toolkit's files
    # name of the layout that most programs apply completely for this family. A LoRA that does not fit it is written in
    # kohya's, which holds all
    portable: str = "kohya"
    # diffusers path → shape of the weight, for files that flatten convolution kernels and to check whether an adapter
    # fits. Modules that are not listed are not checked
    weight_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    limits: ProgramLimits = field(default_factory=ProgramLimits)  # what programs do not apply of this family's files

    def pipeline_place(self, path: str) -> tuple[str, str]:
        """The part of diffusers' pipeline with a module of the denoiser, and the module's path there."""
        part, _, inner = path.partition(".")
        return (part, inner) if part in self.denoiser_parts else (self.peft_prefix, path)

    def paths(self, component: str) -> Collection[str]:
        """Module paths of a component; none of a text encoder that the model lacks."""
        if component == DENOISER:
            return self.denoiser
        return self.text_encoders[component].paths if component in self.text_encoders else ()


@dataclass(frozen=True)
class PlacedModule:
    """A module of a base, and its place within that base."""

    module: ModuleRef
    place: OriginalName


PlacedModules = tuple[PlacedModule, ...]


def diffusers_places(names: ModelNames) -> dict[str, PlacedModules]:
    """The denoiser's modules by diffusers path."""
    return {path: _itself(DENOISER, path) for path in names.denoiser}


def original_places(names: ModelNames) -> dict[str, PlacedModules]:
    """The denoiser's modules by path in the original checkpoint, parts of a fused module in the order of their rows."""
    return _by_place(names.denoiser.items())


def _by_place(originals: Iterable[tuple[str, OriginalName]]) -> dict[str, PlacedModules]:
    """Modules, each a diffusers path and its place, by the path of the place."""
    places: dict[str, list[PlacedModule]] = {}
    for path, original in originals:
        places.setdefault(original.path, []).append(PlacedModule(ModuleRef(DENOISER, path), original))
    return {path: tuple(sorted(parts, key=lambda part: part.place.rows or (0, 0))) for path, parts in places.items()}


def other_places(names: ModelNames) -> dict[str, PlacedModules]:
    """The denoiser's modules by path in files of another naming, which are read and never written.

    These are the family's own (`OriginalName.others`), and those of every attention: `to_out` for diffusers'
    `to_out.0`, and the projections that diffusers' `fuse_qkv_projections` joins.
    """
    others = ((path, other) for path, place in names.denoiser.items() for other in place.others)
    return {**_by_place(_attention_places(names)), **_by_place(others)}


_FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def _attention_places(names: ModelNames) -> Iterator[tuple[str, OriginalName]]:
    for path in names.denoiser:
        stem, _, leaf = path.rpartition(".")
        if path.endswith(".to_out.0") and stem not in names.denoiser:
            yield path, OriginalName(stem)
        for fused_leaf, leaves in _FUSED_PROJECTIONS.items():
            parts = [f"{stem}.{leave}" for leave in leaves]
            whole = f"{stem}.{fused_leaf}"
            if leaf == leaves[0] and whole not in names.denoiser and names.weight_shapes.keys() >= set(parts):
                ends = list(accumulate(names.weight_shapes[part][0] for part in parts))
                for part, start, end in zip(parts, (0, *ends), ends, strict=False):
                    yield part, OriginalName(whole, rows=(start, end))


def encoder_paths(names: ModelNames, component: str) -> Iterator[tuple[str, PlacedModules]]:
    """Paths in a text encoder as files spell them, with and without `text_model.` in front."""
    for path in names.paths(component):
        yield path, _itself(component, path)
        if path.startswith("text_model."):
            yield path.removeprefix("text_model."), _itself(component, path)


def encoder_module(names: ModelNames, path: str) -> ModuleRef:
    """The module of a path that begins with a text encoder's component, as files spell it.

    transformers has no `text_model.` in some paths since version 5.6.
    """
    component, _, inner = path.partition(".")
    return ModuleRef(component, inner if inner in names.paths(component) else f"text_model.{inner}")


def read_tensors(
    tensors: Mapping[str, Tensor],
    bases: Mapping[str, PlacedModules],
    names: ModelNames,
    alphas: Mapping[str, float] | None = None,
) -> AdapterState:
    """The adapters and differences in a file under one of `bases` that fit the model; the rest is `unknown`."""
    state = AdapterState(unknown=dict(tensors))
    for base, keys in grouped(tensors).items():
        if base not in bases:
            continue
        roles = {role: tensors[key] for role, key in keys.items()}
        stated = None if "alpha" in roles else (alphas or {}).get(base)
        modules = _read_base(roles, bases[base], names, stated)
        if modules is None:
            continue
        for key in keys.values():
            del state.unknown[key]
        for ref, module in modules.items():
            _add(state, ref, module)
    return state


def in_original_naming(
    modules: Mapping[str, ModuleTensors], names: ModelNames
) -> tuple[dict[str, ModuleTensors], dict[str, ModuleTensors]]:
    """The denoiser's modules, given by diffusers path, in the original checkpoint's naming.

    Modules by original path, and by diffusers path those without an exact place there: unlisted modules, and adapters
    that cannot be fused.
    """
    original: dict[str, ModuleTensors] = {}
    left = {path: module for path, module in modules.items() if path not in names.denoiser}
    for path, parts in original_places(names).items():
        present = {part.module.path: part.place for part in parts if part.module.path in modules}
        if not present:
            continue
        rows = _rows_in_all(parts)
        adapter = _fused_adapter({p: modules[p].adapter for p in present}, present, rows)
        differences = _fused_differences({p: modules[p].differences for p in present}, present, rows)
        if adapter is None:
            left.update({p: ModuleTensors(modules[p].adapter) for p in present if modules[p].adapter is not None})
        if adapter is not None or differences:
            original[path] = ModuleTensors(adapter, differences)
    return original, left


def unfusable(state: AdapterState, names: ModelNames) -> list[ModuleRef]:
    """Modules whose adapters have no exact place in the original checkpoint, which fuses them with others."""
    module_refs: list[ModuleRef] = []
    for parts in original_places(names).values():
        adapters = {part.module: state.adapters[part.module] for part in parts if part.module in state.adapters}
        if not adapters or _always_fuses(list(adapters.values())):
            continue
        places = {part.module.path: part.place for part in parts if part.module in adapters}
        by_path = {ref.path: weights for ref, weights in adapters.items()}
        if _fused_adapter(by_path, places, _rows_in_all(parts)) is None:
            module_refs += adapters
    return module_refs


def _always_fuses(adapters: Sequence[AdapterWeights]) -> bool:
    """Whether adapters can be fused for any values: LoRAs with factors alone always can."""
    forms = [format_of(weights) for weights in adapters]
    return all(
        form.is_low_rank and weights.tensors.keys() in form.needed
        for form, weights in zip(forms, adapters, strict=True)
    )


def _rows_in_all(parts: PlacedModules) -> int:
    """Output rows of the module that parts form, 0 for a single part."""
    return max((part.place.rows[1] for part in parts if part.place.rows), default=0)


def _itself(component: str, path: str) -> PlacedModules:
    return (PlacedModule(ModuleRef(component, path), OriginalName(path)),)


def _read_base(
    roles: Mapping[str, Tensor], parts: PlacedModules, names: ModelNames, alpha: float | None
) -> dict[ModuleRef, ModuleTensors] | None:
    """Adapters and differences of a base's modules, None if they do not fit there."""
    shapes = [_weight_shape(part.module, names) for part in parts]
    whole = assembled(roles, shapes[0] if parts[0].place.rows is None else None, alpha)
    if isinstance(whole, Unfit):
        return None
    places = [part.place for part in parts]
    adapters = [None] * len(parts) if whole.adapter is None else split(whole.adapter, places)
    if adapters is None:
        return None
    modules = {}
    for part, adapter, shape in zip(parts, adapters, shapes, strict=True):
        module = ModuleTensors(adapter, {p: split_rows(t, part.place) for p, t in whole.differences.items()})
        if shape is not None and not fits(module, shape):
            return None
        modules[part.module] = module
    return modules


def _weight_shape(module: ModuleRef, names: ModelNames) -> tuple[int, ...] | None:
    return names.weight_shapes.get(module.path) if module.component == DENOISER else None


def _add(state: AdapterState, ref: ModuleRef, module: ModuleTensors) -> None:
    if module.adapter is not None:
        if ref in state.adapters:
            raise LoraError(
                f"a LoRA file holds one adapter for a module, and this one has two for {ref.path}; "
                "keep the tensors of one of them"
            )
        state.adapters[ref] = module.adapter
    if module.differences:
        state.differences.setdefault(ref, {}).update(module.differences)


def _fused_adapter(
    adapters: Mapping[str, AdapterWeights | None], places: Mapping[str, OriginalName], rows: int
) -> AdapterWeights | None:
    present = {path: weights for path, weights in adapters.items() if weights is not None}
    return fused(list(present.values()), [places[path] for path in present], rows) if present else None


def _fused_differences(
    differences: Mapping[str, Mapping[str, Tensor]], places: Mapping[str, OriginalName], rows: int
) -> dict[str, Tensor]:
    parameters: Iterable[str] = dict.fromkeys(parameter for some in differences.values() for parameter in some)
    result = {}
    for parameter in parameters:
        present = {path: some[parameter] for path, some in differences.items() if parameter in some}
        result[parameter] = fused_rows(list(present.values()), [places[path] for path in present], rows)
    return result


def split(whole: AdapterWeights, parts: Sequence[OriginalName]) -> list[AdapterWeights | None] | None:
    """Adapters of the parts of a fused module.

    One adapter for each part, None for a part that the fused adapter leaves unchanged; None instead of the list if this
    adapter cannot be cut.
    """
    if _is_plain(parts):
        return [whole]
    units = _row_units(whole)
    if units is None or not all(_aligned(part, whole, units) for part in parts):
        return None
    cut = [
        {
            name: split_rows(tensor, _in_units(part, units[name])) if name in units else tensor
            for name, tensor in whole.tensors.items()
        }
        for part in parts
    ]
    if units.keys() & _needs_all_rows(whole):
        return [AdapterWeights(whole.algorithm, tensors, whole.alpha) for tensors in cut]
    return _trimmed(cut, whole, units)


def fused(adapters: Sequence[AdapterWeights], parts: Sequence[OriginalName], rows: int) -> AdapterWeights | None:
    """The adapter of a fused module. None when adapters of this kind cannot be stacked."""
    if _is_plain(parts):
        return adapters[0]
    algorithm, names = adapters[0].algorithm, adapters[0].tensors.keys()
    if any(weights.algorithm != algorithm or weights.tensors.keys() != names for weights in adapters):
        return None
    units = _row_units(adapters[0])
    if units is None or any(_row_units(weights) != units for weights in adapters):
        return None
    if not all(_aligned(part, weights, units) for part, weights in zip(parts, adapters, strict=True)):
        return None
    covered = sum(_rows(part)[1] - _rows(part)[0] for part in parts) if rows else 0
    needs_all_rows = _needs_all_rows(adapters[0])
    if covered != rows and units.keys() & needs_all_rows:
        return None
    adapters, scale = _equally_scaled(adapters, next(iter(units)))
    shared = _share_columns(adapters, units)
    if not shared and not format_of(adapters[0]).stacks:
        return None
    tensors = {}
    for name in names:
        pieces = _of_one_dtype([weights.tensors[name] for weights in adapters])
        if name not in units:
            tensors[name] = pieces[0] if shared else torch.cat(pieces)
        elif shared or name in needs_all_rows:
            unit = units[name]
            tensors[name] = fused_rows(pieces, [_in_units(part, unit) for part in parts], rows // unit)
        else:
            tensors[name] = _block_diagonal(pieces, parts, rows)
    stacked = AdapterWeights(algorithm, tensors)
    alpha = adapters[0].alpha if shared or scale is None else scale * (rank_of(stacked) or 1)
    return AdapterWeights(algorithm, tensors, alpha)


def split_rows(whole: Tensor, part: OriginalName) -> Tensor:
    """A part's rows (first dimension) of a fused tensor, in the part's own order."""
    rows = whole if part.rows is None else whole[slice(*part.rows)]
    return _exchanged(rows) if part.swap_halves else rows


def fused_rows(pieces: Sequence[Tensor], parts: Sequence[OriginalName], rows: int) -> Tensor:
    """Parts' tensors as rows of one fused tensor, zero elsewhere.

    pieces: tensor of each part, (rows of the part, ...).
    """
    ordered = [_exchanged(piece) if part.swap_halves else piece for piece, part in zip(pieces, parts, strict=True)]
    if not rows:
        return ordered[0]
    whole = pieces[0].new_zeros(rows, *pieces[0].shape[1:])
    for piece, part in zip(ordered, parts, strict=True):
        whole[slice(*_rows(part))] = piece
    return whole


def _needs_all_rows(weights: AdapterWeights) -> frozenset[str]:
    """Roles that need a value for every row: a missing magnitude would scale its row to zero."""
    return format_of(weights).all_rows | {"dora_scale"}


def _is_plain(parts: Sequence[OriginalName]) -> bool:
    return len(parts) == 1 and parts[0].rows is None and not parts[0].swap_halves


def _row_units(weights: AdapterWeights) -> dict[str, int] | None:
    """Tensors whose first dimension follows the output rows → number of rows of one index.

    None if rows of the change are not rows of this adapter's tensors.
    """
    found = format_of(weights).rows(weights)
    if found is None or "dora_scale" not in weights.tensors:
        return None if found is None else dict(found)
    if weights.tensors["dora_scale"].shape[0] == 1:  # a magnitude for each input
        return None
    return {**found, "dora_scale": 1}


def _aligned(part: OriginalName, weights: AdapterWeights, units: Mapping[str, int]) -> bool:
    """Whether a part's rows, and their halves if these are exchanged, begin and end with whole units."""
    name, unit = next(iter(units.items()))
    start, stop = part.rows or (0, weights.tensors[name].shape[0] * unit)
    ends = (start, stop, (start + stop) // 2) if part.swap_halves else (start, stop)
    return all(end % unit == 0 for end in ends)


def _in_units(part: OriginalName, unit: int) -> OriginalName:
    return part if part.rows is None else replace(part, rows=(part.rows[0] // unit, part.rows[1] // unit))


def _exchanged(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _rows(part: OriginalName) -> tuple[int, int]:
    assert part.rows is not None, f"{part.path} is fused from modules of which one has no rows"
    return part.rows


def _of_one_dtype(pieces: list[Tensor]) -> list[Tensor]:
    dtype = pieces[0].dtype
    for piece in pieces:
        dtype = torch.promote_types(dtype, piece.dtype)
    return [piece.to(dtype) for piece in pieces]


def _equally_scaled(adapters: Sequence[AdapterWeights], name: str) -> tuple[Sequence[AdapterWeights], float | None]:
    """Adapters with one alpha / rank, the ratio multiplied into tensor `name` where it differs.

    Returns also that scale, None for "no alpha".
    """
    scales = [scale_of(weights) for weights in adapters]
    if all(scale == scales[0] for scale in scales):
        return adapters, None if all(weights.alpha is None for weights in adapters) else scales[0]
    common = max(scales, key=abs)
    scaled = []
    for weights, scale in zip(adapters, scales, strict=True):
        tensors = {**weights.tensors, name: multiplied(weights.tensors[name], scale / common)}
        scaled.append(AdapterWeights(weights.algorithm, tensors, common * (rank_of(weights) or 1)))
    return scaled, common


def _share_columns(adapters: Sequence[AdapterWeights], units: Mapping[str, int]) -> bool:
    """Whether the parts differ in their row tensors only, as those of a split do."""
    first, *others = adapters
    return all(
        torch.equal(first.tensors[name], other.tensors[name])
        for other in others
        for name in first.tensors.keys() - units.keys()
    )


def _block_diagonal(pieces: Sequence[Tensor], parts: Sequence[OriginalName], rows: int) -> Tensor:
    whole = pieces[0].new_zeros(rows, sum(piece.shape[1] for piece in pieces))
    column = 0
    for piece, part in zip(pieces, parts, strict=True):
        block = _exchanged(piece) if part.swap_halves else piece
        whole[slice(*_rows(part)), column : column + piece.shape[1]] = block
        column += piece.shape[1]
    return whole


def _trimmed(
    cut: list[dict[str, Tensor]], whole: AdapterWeights, units: Mapping[str, int]
) -> list[AdapterWeights | None]:
    """Adapters of the parts, None for those without any change, each with only the ranks that it uses when the parts
    use different ones.

    Stacking gives a block-diagonal up matrix (`fused`, kohya's `split_qkv`): every rank belongs to one part, and a part
    without any had no adapter. Ranks that no part uses are ambiguous, so an untrained LoRA, whose up matrix is zero, is
    not trimmed.
    """
    live = [all(bool(tensors[name].any()) for name in units) for tensors in cut]
    if not any(live):
        live = [True] * len(cut)
    columns = None
    if format_of(whole).stacks:
        columns = _separate_columns(
            [_used(tensors, units) for tensors, is_live in zip(cut, live, strict=True) if is_live]
        )
    result: list[AdapterWeights | None] = []
    for tensors, is_live in zip(cut, live, strict=True):
        if not is_live:
            result.append(None)
        elif columns is None:
            result.append(AdapterWeights(whole.algorithm, tensors, whole.alpha))
        else:
            column = columns.pop(0)
            trimmed = {name: tensor[:, column] if name in units else tensor[column] for name, tensor in tensors.items()}
            alpha = None if whole.alpha is None else scale_of(whole) * len(column)
            result.append(AdapterWeights(whole.algorithm, trimmed, alpha))
    return result


def _used(tensors: Mapping[str, Tensor], units: Mapping[str, int]) -> Tensor:
    """(rank,) whether a part uses each rank."""
    return torch.stack([(tensors[name] != 0).any(0) for name in units]).any(0)


def _separate_columns(used: Sequence[Tensor]) -> list[Tensor] | None:
    """Rank indices of each part if no two parts share a rank, else None.

    used: by part, (rank,) whether it uses each rank.
    """
    if len(used) < 2 or not any(bool(part.any()) for part in used) or int(torch.stack(list(used)).sum(0).max()) > 1:
        return None
    rank, count = len(used[0]), len(used)
    if rank % count == 0:
        # Parts of equal rank are by far the most common; taking whole blocks keeps ranks that happen to be zero.
        blocks = list(torch.arange(rank).chunk(count))
        if all(bool(part[block].sum() == part.sum()) for part, block in zip(used, blocks, strict=True)):
            return blocks
    return [part.nonzero().flatten() for part in used]
