"""The kinds of files, and which cases a run goes through."""

from __future__ import annotations

import torch

from tests.fuzz import (
    caches,
    checkpoints,
    datasets,
    embeddings,
    folders,
    ggufs,
    graphs,
    loras,
    pictures,
    pretrained,
    records,
    texts,
)
from tests.fuzz.engine import Kind, run_case

KINDS: dict[str, Kind] = {
    one.name: one
    for one in (
        Kind("lora", 28, loras.doors),
        Kind("unfit", 4, loras.unfit_doors),
        Kind("checkpoint", 10, checkpoints.doors),
        Kind("gguf", 8, ggufs.doors),
        Kind("graph", 13, graphs.doors),
        Kind("record", 5, records.doors),
        Kind("folder", 11, folders.doors),
        Kind("cache", 2, caches.doors),
        Kind("dataset", 5, datasets.doors),
        Kind("json", 2, texts.json_doors),
        Kind("name", 4, texts.name_doors),
        Kind("picture", 3, pictures.doors),
        Kind("embedding", 3, embeddings.doors),
        Kind("pretrained", 2, pretrained.doors),
    )
}


def prepare() -> None:
    """Import and make whatever is made once, so that no case is charged for it."""
    torch.set_num_threads(1)
    made = (
        loras.files,
        records.recorded,
        ggufs.files,
        checkpoints.parts,
        datasets.files,
        caches.made,
        embeddings.files,
        pretrained.files,
    )
    for make in made:
        make()
    for kind in KINDS.values():
        for seed in range(-6, 0):
            run_case(kind, seed)


def cases(count: int, *, only: str | None = None, start: int = 0) -> list[tuple[str, int]]:
    """Kind and seed of `count` cases, the kinds by their shares and in turn.

    Args:
        count: of the cases.
        only: a kind, if there should be no other.
        start: first seed of each kind.
    """
    if only is not None:
        return [(only, seed) for seed in range(start, start + count)]
    ordered = sorted(
        ((number + 0.5) / kind.share, kind.name, start + number)
        for kind in KINDS.values()
        for number in range(count * kind.share // 100 + 1)
    )
    return [(name, seed) for _, name, seed in ordered[:count]]
