"""One fused module of an original checkpoint ↔ several modules of diffusers' model.

Original Flux, SD3, Lumina and Z-Image checkpoints compute q, k and v in one Linear, diffusers in three; each part
owns a range of the fused output rows. Where an adapter's ΔW can be cut into rows or stacked from them exactly, adapters
are translated; for the others (LoKr, OFT, BOFT, GLoRA, DoRA with magnitudes per input) both functions answer None.

    split   every part keeps the down matrix and takes its rows of the up matrix; alpha and rank stay.
    fused   downs are stacked along the rank and ups put block-diagonally; n parts of rank r give rank n·r, and alpha
            becomes n times as large, so that the scale alpha / rank stays. Parts that share their down matrix, as
            those of a split do, keep it, and with it their rank.

Some parts also have the two halves of their rows exchanged (shift, scale against scale, shift).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.formats.names import OriginalName
from lorasmith.formats.spelling import rank_of, scale_of

__all__ = ["fused", "fused_rows", "split", "split_rows"]


def split(whole: AdapterWeights, parts: Sequence[OriginalName]) -> list[AdapterWeights | None] | None:
    """Adapters of the parts of a fused module.

    Args:
        whole: adapter of the fused module.
        parts: where each part stands; a single part without rows and exchange is the module itself.

    Returns:
        One adapter a part, None for a part that the fused adapter leaves unchanged; None altogether when this
        adapter cannot be cut.
    """
    if _is_plain(parts):
        return [whole]
    if not _by_rows(whole):
        return None
    row_names = _ROW_TENSORS[whole.algorithm]
    cut = [
        {name: split_rows(tensor, part) if name in row_names else tensor for name, tensor in whole.tensors.items()}
        for part in parts
    ]
    if "dora_scale" in whole.tensors:
        return [AdapterWeights(whole.algorithm, tensors, whole.alpha) for tensors in cut]
    return _trimmed(cut, whole)


def fused(adapters: Sequence[AdapterWeights], parts: Sequence[OriginalName], rows: int) -> AdapterWeights | None:
    """The adapter of a fused module.

    Args:
        adapters: adapters of the parts that have one.
        parts: where each of these parts stands.
        rows: output rows of the fused module, of which those that no part covers get no change; 0 for a module that
            is not fused.

    Returns:
        None when adapters of this kind cannot be stacked.
    """
    if _is_plain(parts):
        return adapters[0]
    algorithm = adapters[0].algorithm
    if not all(_by_rows(weights) and weights.tensors.keys() == adapters[0].tensors.keys() for weights in adapters):
        return None
    if any(weights.algorithm != algorithm for weights in adapters):
        return None
    if rows and "dora_scale" in adapters[0].tensors and sum(len(a.tensors["dora_scale"]) for a in adapters) != rows:
        return None  # a row without a magnitude would be scaled to nothing
    adapters, scale = _equally_scaled(adapters)
    shared = _share_columns(adapters)
    tensors = {}
    for name in adapters[0].tensors:
        pieces = [weights.tensors[name] for weights in adapters]
        if name not in _ROW_TENSORS[algorithm]:
            tensors[name] = pieces[0] if shared else torch.cat(pieces)
        elif shared or name == "dora_scale":
            tensors[name] = fused_rows(pieces, parts, rows)
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
    """Parts' tensors as rows of one fused tensor, zero where no part is; `rows` is 0 for a module that is not fused."""
    ordered = [_exchanged(piece) if part.swap_halves else piece for piece, part in zip(pieces, parts, strict=True)]
    if not rows:
        return ordered[0]
    whole = pieces[0].new_zeros(rows, *pieces[0].shape[1:])
    for piece, part in zip(ordered, parts, strict=True):
        whole[slice(*_rows(part))] = piece
    return whole


# Tensors whose first dimension is the module's output rows; the first dimension of the others is the rank.
_ROW_TENSORS = {
    "lora": frozenset({"up", "dora_scale"}),
    "loha": frozenset({"hada_w1_a", "hada_w2_a", "dora_scale"}),
}
_SCALED_TENSOR = {"lora": "up", "loha": "hada_w1_a"}


def _is_plain(parts: Sequence[OriginalName]) -> bool:
    return len(parts) == 1 and parts[0].rows is None and not parts[0].swap_halves


def _by_rows(weights: AdapterWeights) -> bool:
    """Whether rows of ΔW are rows of this adapter's tensors."""
    tensors = weights.tensors
    if weights.algorithm == "lora":
        # Magnitudes per output can be cut like the up matrix; those per input belong to the whole column.
        return "dora_scale" not in tensors or tensors["dora_scale"].shape[0] == tensors["up"].shape[0]
    return weights.algorithm == "loha" and not {"hada_t1", "dora_scale"} & tensors.keys()


def _exchanged(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _rows(part: OriginalName) -> tuple[int, int]:
    assert part.rows is not None, f"{part.path} is fused from modules of which one has no rows"
    return part.rows


def _equally_scaled(adapters: Sequence[AdapterWeights]) -> tuple[Sequence[AdapterWeights], float | None]:
    """Adapters with one alpha / rank, baked into the tensors where it differs; that scale, None for "no alpha"."""
    scales = [scale_of(weights) for weights in adapters]
    if all(scale == scales[0] for scale in scales):
        return adapters, None if all(weights.alpha is None for weights in adapters) else scales[0]
    baked = []
    for weights, scale in zip(adapters, scales, strict=True):
        name = _SCALED_TENSOR[weights.algorithm]
        tensors = {**weights.tensors, name: weights.tensors[name] * scale}
        baked.append(AdapterWeights(weights.algorithm, tensors, float(rank_of(weights) or 1)))
    return baked, 1.0


def _share_columns(adapters: Sequence[AdapterWeights]) -> bool:
    """Whether the parts differ in their row tensors only, as those of a split do."""
    first, *others = adapters
    return all(
        torch.equal(first.tensors[name], other.tensors[name])
        for other in others
        for name in first.tensors.keys() - _ROW_TENSORS[first.algorithm]
    )


def _block_diagonal(pieces: Sequence[Tensor], parts: Sequence[OriginalName], rows: int) -> Tensor:
    whole = pieces[0].new_zeros(rows, sum(piece.shape[1] for piece in pieces))
    column = 0
    for piece, part in zip(pieces, parts, strict=True):
        block = _exchanged(piece) if part.swap_halves else piece
        whole[slice(*_rows(part)), column : column + piece.shape[1]] = block
        column += piece.shape[1]
    return whole


def _trimmed(cut: list[dict[str, Tensor]], whole: AdapterWeights) -> list[AdapterWeights | None]:
    """Adapters of the parts, each with only the ranks that it uses when the parts use different ones.

    A block-diagonal up matrix is what stacking gives (`fused`, kohya's `split_qkv`): there every rank belongs to one
    part, and a part without any had no adapter. Ranks that no part uses prove nothing, so an untrained LoRA, whose up
    matrix is zero, stays whole.
    """
    row_names = _ROW_TENSORS[whole.algorithm]
    used = [
        torch.stack([(tensor != 0).any(0) for name, tensor in tensors.items() if name in row_names]).any(0)
        for tensors in cut
    ]
    live = [bool(columns.any()) for columns in used]
    if not any(live):
        return [AdapterWeights(whole.algorithm, tensors, whole.alpha) for tensors in cut]
    columns = _separate_columns([part for part, is_live in zip(used, live, strict=True) if is_live])
    result: list[AdapterWeights | None] = []
    for tensors, is_live in zip(cut, live, strict=True):
        if not is_live:
            result.append(None)
        elif columns is None:
            result.append(AdapterWeights(whole.algorithm, tensors, whole.alpha))
        else:
            kept = columns.pop(0)
            trimmed = {name: tensor[:, kept] if name in row_names else tensor[kept] for name, tensor in tensors.items()}
            alpha = None if whole.alpha is None else scale_of(whole) * len(kept)
            result.append(AdapterWeights(whole.algorithm, trimmed, alpha))
    return result


def _separate_columns(used: Sequence[Tensor]) -> list[Tensor] | None:
    """Rank indices of each part when no rank serves two parts, else None.

    Args:
        used: by part, (rank,) whether it uses each rank.
    """
    if len(used) < 2 or int(torch.stack(list(used)).sum(0).max()) > 1:
        return None
    rank, count = len(used[0]), len(used)
    if rank % count == 0:
        # Parts of equal rank are by far the most common; taking whole blocks keeps ranks that happen to be zero.
        blocks = list(torch.arange(rank).chunk(count))
        if all(bool(part[block].sum() == part.sum()) for part, block in zip(used, blocks, strict=True)):
            return blocks
    return [part.nonzero().flatten() for part in used]
