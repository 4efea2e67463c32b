"""Bands of a T-LoRA: their sum is the whole, and at each noise level those that are on are the ranks of training."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, OptionError, OutputError
from lorasmith.core.rank_schedule import RankSchedule
from lorasmith.diffusion.schedule import DiscreteSchedule, FlowSchedule
from lorasmith.families.model import Model
from lorasmith.formats.lora_file import load_lora, save_lora
from lorasmith.formats.metadata import RANKS_ENTRY, LeveledRanks
from lorasmith.formats.scales import scale_of
from lorasmith.toolbox import bands
from lorasmith.toolbox.bands import GRAPH, cut_into_bands, start_percent

TINY = "lorasmith-tiny"


def saved(model: Model, path: Path, ranks: Mapping[str, int], leveled: LeveledRanks) -> AdapterState:
    """A T-LoRA with random factors on modules whose path ends so, and layers of a text encoder beside them."""
    random = torch.Generator().manual_seed(0)
    state = AdapterState()
    for end, rank in ranks.items():
        place = next(one for one in model.names.denoiser if one.endswith(end))
        out, inside = model.names.weight_shapes[place][:2]
        tensors = {"down": torch.randn(rank, inside, generator=random), "up": torch.randn(out, rank, generator=random)}
        state.adapters[ModuleRef(DENOISER, place)] = AdapterWeights("lora", tensors, rank / 2)
    state.differences[ModuleRef(DENOISER, place)] = {"bias": torch.ones(out)}
    save_lora(path, state, model.names, metadata={RANKS_ENTRY: leveled.to_entry()})
    return load_lora(path, model.names)


def change(weights: AdapterWeights, used: int | None = None) -> Tensor:
    return scale_of(weights) * weights.tensors["up"][:, :used].float() @ weights.tensors["down"][:used].float()


@pytest.mark.parametrize("copies", [1, 2])
def test_bands_that_are_on_are_the_ranks_of_the_level(tmp_path: Path, tiny: Model, copies: int) -> None:
    ranks = {"attn1.to_q": 6 * copies, "attn2.to_k": 3 * copies}
    leveled = LeveledRanks(RankSchedule(2, 1.5, copies), sum(ranks.values()), 1.0, 1000)
    whole = saved(tiny, tmp_path / "dog.safetensors", ranks, leveled)
    done = cut_into_bands(tmp_path / "dog.safetensors", tmp_path / "bands", model=TINY)
    parts = [load_lora(band.path, tiny.names) for band in done.bands]

    assert done.is_exact and len(parts) == 1 + 4  # the one rank of the smaller module comes in with the last
    assert [len(one.differences) for one in parts] == [1, 0, 0, 0, 0]
    assert all(RANKS_ENTRY not in one.metadata for one in parts)
    starts = [band.start_percent for band in done.bands]
    assert starts == sorted(starts) and starts[0] == 0
    table = DiscreteSchedule.scaled_linear()
    for time in (999, 800, 500, 250, 120, 40, 0):
        sigma = float(table.sigmas[time])
        on = [one for one, start in zip(parts, starts, strict=True) if table.sigma_at(start) >= sigma]
        for ref, weights in whole.adapters.items():
            rank = weights.tensors["down"].shape[0]
            used = int(leveled.schedule.ranks(table.share(torch.tensor([time])), rank // copies)) * copies
            total = sum(change(one.adapters[ref]) for one in on if ref in one.adapters)
            torch.testing.assert_close(total, change(weights, used), rtol=1e-4, atol=1e-4)
    for ref, weights in whole.adapters.items():  # all together are the LoRA
        total = sum(change(one.adapters[ref]) for one in parts if ref in one.adapters)
        torch.testing.assert_close(total, change(weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flows_start_at_their_own_sigmas(shift: float) -> None:
    flow = FlowSchedule(shift)
    for share in (0.9, 0.5, 0.1, 0.001):
        percent = start_percent(share, LeveledRanks(RankSchedule(1, 1.0), 4, shift, 0))
        assert flow.sigma_at(percent) == pytest.approx(share, abs=1e-4)
        assert flow.sigma_at(percent) >= share - 1e-6
    assert start_percent(1.0, LeveledRanks(RankSchedule(1, 1.0), 4, shift, 0)) == 0


def test_fewer_bands_join_levels(tmp_path: Path, tiny: Model) -> None:
    leveled = LeveledRanks(RankSchedule(1, 1.0), 12, 1.0, 1000)
    whole = saved(tiny, tmp_path / "dog.safetensors", {"attn1.to_q": 12}, leveled)
    done = cut_into_bands(tmp_path / "dog.safetensors", tmp_path / "few", count=3, model=TINY)
    parts = [load_lora(band.path, tiny.names) for band in done.bands]

    assert not done.is_exact
    (ref,) = whole.adapters
    assert [one.adapters[ref].tensors["down"].shape[0] for one in parts] == [1, 5, 6]
    torch.testing.assert_close(
        sum(change(one.adapters[ref]) for one in parts), change(whole.adapters[ref]), rtol=1e-4, atol=1e-4
    )
    one = cut_into_bands(tmp_path / "dog.safetensors", tmp_path / "one", count=1, model=TINY)
    assert len(one.bands) == 1


def test_the_graph_switches_each_band_on(tmp_path: Path, tiny: Model) -> None:
    leveled = LeveledRanks(RankSchedule(1, 1.0), 4, 1.0, 1000)
    saved(tiny, tmp_path / "dog.safetensors", {"attn1.to_q": 4}, leveled)
    done = cut_into_bands(tmp_path / "dog.safetensors", tmp_path / "dog-bands", model=TINY)
    graph = json.loads((done.folder / GRAPH).read_bytes())
    kinds = Counter(node["class_type"] for node in graph.values())

    assert (kinds["CreateHookLora"], kinds["SetHookKeyframes"], kinds["CombineHooks2"]) == (4, 3, 3)
    for node in graph.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in graph
    loras = [node["inputs"]["lora_name"] for node in graph.values() if node["class_type"] == "CreateHookLora"]
    assert loras == [f"dog-bands/{band.path.name}" for band in done.bands]
    assert all((tmp_path / name).is_file() for name in loras)


def test_what_cannot_be_cut_is_refused(tmp_path: Path, tiny: Model) -> None:
    leveled = LeveledRanks(RankSchedule(1, 1.0), 4, 1.0, 1000)
    path = tmp_path / "dog.safetensors"
    state = saved(tiny, path, {"attn1.to_q": 4}, leveled)
    with pytest.raises(OptionError, match="at least 1 band, got 0"):
        cut_into_bands(path, tmp_path / "bands", count=0, model=TINY)
    done = cut_into_bands(path, tmp_path / "bands", model=TINY)
    with pytest.raises(LoraError, match="must be a T-LoRA as it was trained, and has no ranks by noise level; give"):
        cut_into_bands(done.bands[0].path, tmp_path / "again", model=TINY)
    save_lora(path, state, tiny.names, metadata={RANKS_ENTRY: leveled.to_entry().replace('"total": 4', '"total": 8')})
    with pytest.raises(LoraError, match="no ranks by noise level that are those of training"):
        cut_into_bands(path, tmp_path / "again", model=TINY)
    shutil.copytree(done.folder, tmp_path / "loras")
    (tmp_path / "loras" / GRAPH).unlink()
    with pytest.raises(OutputError, match="only a folder of bands is replaced"):
        cut_into_bands(path, tmp_path / "loras", model=TINY, overwrite=True)
    assert bands.MOST_BANDS > 1
