"""Names in files ↔ modules of a model, and tensors converted between them.

A base (a key without its suffix) names one module, or several that the original checkpoint fuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.formats.names.fusing import fused, fused_rows, split, split_rows
from lorasmith.formats.names.model_names import ModelNames, OriginalName
from lorasmith.formats.names.spelling import ModuleTensors, Unfit, assembled, fits, grouped

__all__ = [
    "Part",
    "Parts",
    "addressed",
    "alias_places",
    "diffusers_places",
    "encoder_paths",
    "in_original_naming",
    "original_places",
    "read_tensors",
    "unfusable",
]


@dataclass(frozen=True)
class Part:
    """A module of a base, and its place within that base."""

    module: ModuleRef
    place: OriginalName


Parts = tuple[Part, ...]


def diffusers_places(names: ModelNames) -> dict[str, Parts]:
    """The denoiser's modules by diffusers path."""
    return {path: _itself(DENOISER, path) for path in names.denoiser}


def original_places(names: ModelNames) -> dict[str, Parts]:
    """The denoiser's modules by path in the original checkpoint, parts of a fused module in the order of their rows."""
    places: dict[str, list[Part]] = {}
    for path, original in names.denoiser.items():
        places.setdefault(original.path, []).append(Part(ModuleRef(DENOISER, path), original))
    return {path: tuple(sorted(parts, key=lambda part: part.place.rows or (0, 0))) for path, parts in places.items()}


def alias_places(names: ModelNames) -> dict[str, Parts]:
    """The denoiser's modules by further names in files."""
    return {
        alias: tuple(Part(ModuleRef(DENOISER, path), names.denoiser[path]) for path in paths)
        for alias, paths in names.aliases.items()
    }


def encoder_paths(names: ModelNames, component: str) -> Iterator[tuple[str, Parts]]:
    """Paths in a text encoder as files spell them, with and without `text_model.` in front."""
    for path in names.paths(component):
        yield path, _itself(component, path)
        if path.startswith("text_model."):
            yield path.removeprefix("text_model."), _itself(component, path)


def read_tensors(
    tensors: Mapping[str, Tensor],
    bases: Mapping[str, Parts],
    names: ModelNames,
    alphas: Mapping[str, float] | None = None,
) -> AdapterState:
    """The adapters and differences in a file under one of `bases` that fit the model; the rest is `unknown`.

    Args:
        tensors: by key.
        bases: modules of each base.
        names: the model's.
        alphas: by base, alphas that the file states elsewhere than in `.alpha` tensors.

    Raises:
        LoraError: two bases name the same module.
    """
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


def addressed(
    state: AdapterState,
    names: ModelNames,
    base_of: Callable[[ModuleRef], str],
    original_base: Callable[[str], str] | None = None,
) -> dict[str, ModuleTensors]:
    """Adapters and differences joined by module, under their names in a file.

    Args:
        state: the LoRA.
        names: the model's.
        base_of: base of a module in diffusers' naming.
        original_base: base of a path in the original checkpoint, for the denoiser's modules that have an exact place
            there; None to name all by `base_of`.
    """
    refs = dict.fromkeys((*state.adapters, *state.differences))
    modules = {ref: ModuleTensors(state.adapters.get(ref), state.differences.get(ref, {})) for ref in refs}
    if original_base is None:
        return {base_of(ref): module for ref, module in modules.items()}
    denoiser = {ref.path: module for ref, module in modules.items() if ref.component == DENOISER}
    original, left = in_original_naming(denoiser, names)
    return {
        **{original_base(path): module for path, module in original.items()},
        **{base_of(ModuleRef(DENOISER, path)): module for path, module in left.items()},
        **{base_of(ref): module for ref, module in modules.items() if ref.component != DENOISER},
    }


def in_original_naming(
    modules: Mapping[str, ModuleTensors], names: ModelNames
) -> tuple[dict[str, ModuleTensors], dict[str, ModuleTensors]]:
    """The denoiser's modules, given by diffusers path, in the original checkpoint's naming.

    Returns:
        Modules by original path, and by diffusers path those without an exact place there: unlisted modules, and
        adapters that cannot be fused.
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
    found: list[ModuleRef] = []
    for parts in original_places(names).values():
        adapters = {part.module: state.adapters[part.module] for part in parts if part.module in state.adapters}
        if not adapters or _always_fuses(list(adapters.values())):
            continue
        places = {part.module.path: part.place for part in parts if part.module in adapters}
        by_path = {ref.path: weights for ref, weights in adapters.items()}
        if _fused_adapter(by_path, places, _rows_in_all(parts)) is None:
            found += adapters
    return found


def _always_fuses(adapters: Sequence[AdapterWeights]) -> bool:
    """Whether adapters can be fused for any values: LoRAs with factors alone always can."""
    forms = [format_of(weights) for weights in adapters]
    return all(
        form.is_low_rank and weights.tensors.keys() in form.needed
        for form, weights in zip(forms, adapters, strict=True)
    )


def _rows_in_all(parts: Parts) -> int:
    """Output rows of the module that parts form, 0 for a single part."""
    return max((part.place.rows[1] for part in parts if part.place.rows), default=0)


def _itself(component: str, path: str) -> Parts:
    return (Part(ModuleRef(component, path), OriginalName(path)),)


def _read_base(
    roles: Mapping[str, Tensor], parts: Parts, names: ModelNames, alpha: float | None
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
