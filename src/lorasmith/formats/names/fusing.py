"""One fused module of an original checkpoint ↔ several modules of diffusers' model.

Original Flux, SD3, Lumina and Z-Image checkpoints compute q, k and v in one Linear, diffusers in three; each part
owns a range of the fused output rows. Where an adapter can be cut into rows or stacked from them exactly, adapters are
translated; for the others both functions return None.

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

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.adapters.algorithms import format_of
from lorasmith.core.adapter_format import multiplied
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.formats.names.model_names import OriginalName
from lorasmith.formats.scales import rank_of, scale_of

__all__ = ["fused", "fused_rows", "split", "split_rows"]


def split(whole: AdapterWeights, parts: Sequence[OriginalName]) -> list[AdapterWeights | None] | None:
    """Adapters of the parts of a fused module.

    Args:
        whole: adapter of the fused module.
        parts: place of each part; a single part without rows and exchange is the module itself.

    Returns:
        One adapter for each part, None for a part that the fused adapter leaves unchanged; None instead of the list if
        this adapter cannot be cut.
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
    """The adapter of a fused module.

    Args:
        adapters: adapters of the parts that have one.
        parts: place of each of these parts.
        rows: output rows of the fused module; those outside all parts are not changed. 0 for a module that is not
            fused.

    Returns:
        None when adapters of this kind cannot be stacked.
    """
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

    Args:
        pieces: tensor of each part, (rows of the part, ...).
        parts: place of each part.
        rows: rows of the fused tensor; 0 for a module that is not fused.
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

    Returns:
        The adapters and that scale, None for "no alpha".
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
            kept = columns.pop(0)
            trimmed = {name: tensor[:, kept] if name in units else tensor[kept] for name, tensor in tensors.items()}
            alpha = None if whole.alpha is None else scale_of(whole) * len(kept)
            result.append(AdapterWeights(whole.algorithm, trimmed, alpha))
    return result


def _used(tensors: Mapping[str, Tensor], units: Mapping[str, int]) -> Tensor:
    """(rank,) whether a part uses each rank."""
    return torch.stack([(tensors[name] != 0).any(0) for name in units]).any(0)


def _separate_columns(used: Sequence[Tensor]) -> list[Tensor] | None:
    """Rank indices of each part if no two parts share a rank, else None.

    Args:
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
